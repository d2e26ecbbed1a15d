#!/usr/bin/env bash
# Run all tests on this machine's CPU. Arguments go to pytest: "bash tests/test.sh --all" adds the slow sweeps,
# "bash tests/test.sh --random-order 7" shuffles the files, and the tests of each file, by the seed 7.
set -eo pipefail
cd "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/.."

PYTHON=${PYTHON:-$(command -v python3 || command -v python || true)}
[[ -n $PYTHON ]] || { echo "error: no python3 on PATH: install Python 3.10 or newer, or set PYTHON" >&2; exit 2; }
"$PYTHON" -c '
import sys
if sys.version_info < (3, 10):
    sys.exit("error: Python 3.10 or newer is needed, and this is Python " + sys.version.split()[0] + ": set PYTHON")
' || exit 2
missing=$("$PYTHON" -c '
from importlib.util import find_spec
print(*[name for name in ("torch", "pytest", "xdist", "transformers", "pyarrow", "nltk") if find_spec(name) is None])')
if [[ -n $missing ]]; then
    echo "error: $PYTHON has no $missing: run pip install -e '.[test]' in the checkout" >&2
    exit 2
fi

# Test models are tiny: one thread a process, and as many processes as there are cores.
export OMP_NUM_THREADS=1 MEGATRON_DEVICE=${MEGATRON_DEVICE:-cpu}
export TORCH_DEVICE_BACKEND_AUTOLOAD=${TORCH_DEVICE_BACKEND_AUTOLOAD:-0}
export HF_HUB_OFFLINE=1 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
cores=$("$PYTHON" -c 'import os; print(min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()))')
exec "$PYTHON" -m pytest -q -n "${TEST_WORKERS:-$cores}" --dist loadfile "$@"
