"""Which test runs each command that the documentation shows.

``tests/docs/test_pages.py`` types the pages of ``TYPED_IN_ORDER`` from top to bottom, in a directory that
looks like a clone. A command that another test runs has a row in ``RUN_ELSEWHERE``; the architecture tests
fail on a command without either, on a row without a command, and on a test that does not exist.
"""

import re
from dataclasses import dataclass

TYPED_IN_ORDER = (
    "docs/index.md",
    "docs/concepts.md",
    "docs/own_data.md",
    "docs/resume.md",
    "docs/parallel.md",
    "docs/experts.md",
    "docs/without_a_card.md",
    "docs/formats.md",
    "docs/api.md",
)


@dataclass(frozen=True)
class Row:
    """Commands of a page, and the test that runs them.

    Attributes:
        page: path from the root of the project.
        command: regular expression for whole commands.
        test: a file, or ``file::function``. ``README.md`` stands for the tests of the same command there.
    """

    page: str
    command: str
    test: str

    def fits(self, page: str, command: str) -> bool:
        return page == self.page and re.fullmatch(self.command, command) is not None


FUNCTIONAL = "tests/functional_tests"
VIRTUAL_PAGE = "tests/npu/test_virtual_npu_page.py"
RUN_ELSEWHERE = (
    # Continuous integration types the two commands that README.md opens with.
    Row("README.md", r"python3 -m venv .*&& bash tests_gpt/\S+_fp16.sh .*", ".ci/run"),
    Row("README.md", r"python3 -m venv .*&& bash tests/test.sh", ".ci/run"),
    Row("README.md", r"pip install -e '\.\[docs\]' && sphinx-build .*", "tests/docs/test_site.py"),
    Row("README.md", r"NPROC_PER_NODE=8 bash tests_gpt/.*", f"{FUNCTIONAL}/test_scripts.py"),
    Row("README.md", r"bash tests_gpt/.*", f"{FUNCTIONAL}/test_scripts.py"),
    Row("README.md", r"python tools/preprocess_data.py .*", f"{FUNCTIONAL}/test_own_data.py"),
    Row("README.md", r"python pretrain_gpt.py .*", f"{FUNCTIONAL}/test_own_data.py"),
    Row("README.md", r"python tools/generate.py .*", f"{FUNCTIONAL}/test_own_data.py"),
    Row("docs/index.md", r"python3 -m venv .*", "README.md"),
    Row("docs/own_data.md", r"python tools/preprocess_data.py .*", "README.md"),
    Row("docs/own_data.md", r"python pretrain_gpt.py .*", "README.md"),
    Row("docs/own_data.md", r"python tools/generate.py .*", "README.md"),
    # The test compares the Chinese page with the English one, which it types.
    Row(
        "docs/index_zh.md", r"(?s).*", "tests/arch/test_docs.py::test_both_start_pages_show_the_same_commands"
    ),
    Row("docs/migrating.md", r".*", f"{FUNCTIONAL}/test_migrating_page.py"),
    Row(
        "docs/migrating_zh.md",
        r".*",
        f"{FUNCTIONAL}/test_migrating_page.py::test_both_languages_have_the_same_commands_and_tables",
    ),
    Row("docs/npu.md", r"source tests_gpt/env_npu.sh", f"{FUNCTIONAL}/test_env_npu.py"),
    Row("docs/npu.md", r"python -m megatron_npu( check)?", VIRTUAL_PAGE),
    Row("docs/npu.md", r"bash tests_gpt/.*", f"{FUNCTIONAL}/test_scripts.py"),
    Row("docs/npu.md", r"import megatron_npu.megatron_adaptor\n", "tests/npu/test_adaptor.py"),
    Row("docs/virtual_npu.md", r"(\S+=\S+ )?python -m \S+\.virtual .*", VIRTUAL_PAGE),
    # Continuous integration installs these, with the CPU's torch from wherever pip finds it.
    Row("docs/virtual_npu.md", r"python3 -m venv .*", ".ci/run"),
    Row("docs/virtual_npu.md", r"pip install (torch==2\.13\.0 .*|-e '\.\[npu-test\]')", ".ci/run"),
)
