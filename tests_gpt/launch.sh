# Shared by the pretrain_gpt_distributed*.sh scripts, which source it and call launch_gpt.
#
# It finds Python, the device, CANN and the data, puts the flags of one recipe together, and starts
# pretrain_gpt.py. Nothing here is needed to train: pretrain_gpt.py with the same flags does the same.

usage() {
    cat <<EOF
usage: $(basename "$0") [--pre N] [--next N] [--shape_order SBH|BSH] [any flag of pretrain_gpt.py ...]

  --pre, --pre-tockens N        tokens before a query that attention sees (65536)
  --next, --next-tockens N      tokens after a query that attention sees (0; a GPT stays causal)
  --shape_order, --shape-order  layout handed to the attention kernel (SBH)
Each takes "=VALUE" or " VALUE", with "-" or "_". Every other flag goes to pretrain_gpt.py, after the
script's own, so that it wins. "python pretrain_gpt.py --help" lists them.

Environment, all optional:
  DATA_PATH                     prefix of a .bin/.idx pair, or a blend "0.3 A 0.7 B"; without it a small
                                corpus is made from Python's own library
  VOCAB_FILE, MERGE_FILE        GPT-2 BPE files of that data
  CKPT_PATH                     directory to save to, and to resume from
  MEGATRON_DEVICE               cpu, cuda or npu instead of the device found
  MEGATRON_RECIPE_SIZE          small or published: the model (small on a CPU, published elsewhere)
  NPROC_PER_NODE                processes on this machine (one per device found); GPUS_PER_NODE is the same
  NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT    as torchrun knows them
  PYTHON                        interpreter to use (python3)
  CANN_SET_ENV                  CANN's set_env.sh, where env_npu.sh does not find it
  MEGATRON_CACHE                where the default data is kept
EOF
}

# Where nobody reads any more, the run goes on.
say() { printf 'launch: %s\n' "$*" 2>/dev/null || true; }

die() {
    printf 'error: %s\n' "$*" >&2
    exit 2
}

# split_options ARGS...: sets PRE, NEXT, SHAPE_ORDER and the array PASSED with everything else.
split_options() {
    PRE=65536 NEXT=0 SHAPE_ORDER=SBH PASSED=()
    local variable value
    while (($#)); do
        case ${1%%=*} in
            --pre | --pre-tockens | --pre_tockens) variable=PRE ;;
            --next | --next-tockens | --next_tockens) variable=NEXT ;;
            --shape | --shape-order | --shape_order) variable=SHAPE_ORDER ;;
            *)
                PASSED+=("$1")
                shift
                continue
                ;;
        esac
        if [[ $1 == *=* ]]; then
            value=${1#*=}
        elif (($# > 1)) && [[ $2 != --* ]]; then
            value=$2
            shift
        else
            value=
        fi
        [[ -n $value ]] || die "${1%%=*} needs a value, for instance ${1%%=*}=${!variable}"
        printf -v "$variable" %s "$value"
        shift
    done
    [[ $PRE =~ ^-?[0-9]+$ ]] || die "--pre $PRE: a number of tokens is needed, for instance --pre=65536"
    [[ $NEXT =~ ^-?[0-9]+$ ]] || die "--next $NEXT: a number of tokens is needed, for instance --next=0"
    [[ $SHAPE_ORDER == [SB][BS]H ]] || die "--shape_order $SHAPE_ORDER: SBH or BSH is needed"
}

# has_flag NAME...: whether one of the flags was passed on, as "NAME VALUE" or "NAME=VALUE".
has_flag() {
    local word name
    for word in "${PASSED[@]}"; do
        for name in "$@"; do
            [[ ${word%%=*} == "$name" ]] && return 0
        done
    done
    return 1
}

# last_value NAME WORDS...: prints the value that argparse would take for NAME.
last_value() {
    local name=$1 found=
    shift
    while (($#)); do
        case $1 in
            "$name") found=$2 ;;
            "$name="*) found=${1#*=} ;;
        esac
        shift
    done
    printf '%s\n' "$found"
}

# find_python: sets PYTHON; ends the script with a remedy when it is too old or packages are missing.
find_python() {
    [[ -n $PYTHON ]] || PYTHON=$(python_on_path)
    [[ -n $PYTHON ]] || die "no python3 on PATH: install Python 3.10 or newer, or set PYTHON"
    # Absolute, but not through links: an environment's interpreter is one.
    [[ $PYTHON != [!/]*/* ]] || PYTHON=$PWD/$PYTHON
    # In words that any Python can read.
    "$PYTHON" - <<'EOF' || exit 2
import sys
found = sys.executable + " (Python " + sys.version.split()[0] + ")"
if sys.version_info < (3, 10):
    sys.exit("error: " + found + " is too old: Python 3.10 or newer is needed; set PYTHON=/path/to/python3")
import importlib.util
missing = [name for name in ("torch", "numpy", "tokenizers") if importlib.util.find_spec(name) is None]
if missing:
    sys.exit("error: " + found + " has no " + ", ".join(missing) + ": activate the environment that has, set "
             "PYTHON=/path/to/python3, or run: pip install -e . (in the checkout)")
EOF
}

# python_on_path: prints the python3 of PATH; where that is too old, a newer one that stands there under its
# full name, those first that have torch.
python_on_path() {
    local first name found=
    first=$(command -v python3 || command -v python || true)
    if [[ -n $first ]] && ! can_run "$first" 'sys.version_info >= (3, 10)'; then
        for name in python3.1{4,3,2,1,0}; do
            can_run "$name" 'sys.version_info >= (3, 10)' || continue
            found=${found:-$(command -v "$name")}
            if can_run "$name" '__import__("importlib.util").util.find_spec("torch")'; then
                found=$(command -v "$name")
                break
            fi
        done
    fi
    printf '%s\n' "${found:-$first}"
}

# can_run PYTHON CONDITION: whether it starts and finds the condition true.
can_run() { "$1" -c "import sys; sys.exit(not ($2))" >/dev/null 2>&1; }

# find_device: sets DEVICE (cpu, cuda, npu ...) and DEVICE_COUNT, and reads env_npu.sh for an NPU.
# Torch is asked only where the machine has a device file: its import takes seconds.
find_device() {
    DEVICE=${MEGATRON_DEVICE:-} DEVICE_COUNT=0
    if [[ -z $DEVICE ]] && ! device_files nvidia0 davinci0 davinci_manager kfd dxg dri/renderD128; then
        DEVICE=cpu
    fi
    if [[ ${DEVICE%%:*} == cpu ]]; then
        DEVICE=cpu
        # A torch_npu without CANN would make "import torch" fail on this host.
        export TORCH_DEVICE_BACKEND_AUTOLOAD=${TORCH_DEVICE_BACKEND_AUTOLOAD:-0}
        # Threads that wait in a loop made steps 5 to 15 times slower whenever anything else wanted a core;
        # sleeping ones cost nothing measurable on an idle machine.
        export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-passive}
        return
    fi
    if [[ $DEVICE == npu* ]] || device_files davinci0 davinci_manager; then
        # shellcheck source=tests_gpt/env_npu.sh
        source "$REPO/tests_gpt/env_npu.sh"
        # Before torch is imported: with a torch_npu that does not work, that would end in a traceback.
        "$PYTHON" -m megatron_npu.versions || die "MEGATRON_DEVICE=cpu trains without the NPU"
    fi
    local answer
    answer=$("$PYTHON" -c 'from megatron.core import accelerator as a; print(a.device_type(), a.device_count())') ||
        die "PyTorch cannot use this machine's accelerator, see above. MEGATRON_DEVICE=cpu trains without it"
    read -r DEVICE DEVICE_COUNT <<<"$answer"
}

# device_files NAME...: whether one of the names exists under /dev.
device_files() {
    local name
    for name in "$@"; do
        [[ -e ${DEV_DIR:-/dev}/$name ]] && return 0
    done
    return 1
}

# default_env NAME VALUE: exports NAME unless the user has set it, and says so.
default_env() {
    [[ -n ${!1} ]] && return 0
    export "$1=$2"
    say "set $1=$2"
}

# prepare_data: sets the array DATA_FLAGS, and EMBEDDED=1 when the default corpus is used.
prepare_data() {
    DATA_FLAGS=() EMBEDDED=0
    if [[ -z $DATA_PATH ]] && ! has_flag --data-path --train-data-path --valid-data-path --test-data-path \
        --data-args-path --per-split-data-args-path --mock-data --yaml-cfg; then
        local answer
        pass_signals "$PYTHON" -m megatron.training.default_data >/dev/null || exit $?
        answer=$("$PYTHON" -m megatron.training.default_data) || exit $? # where it is; at once
        eval "$answer" # DATA_PATH, VOCAB_FILE and MERGE_FILE, quoted for the shell
        EMBEDDED=1
        say "data: $DATA_PATH"
    fi
    if [[ $EMBEDDED == 1 ]]; then
        DATA_FLAGS+=(--data-path "$DATA_PATH")
    elif [[ -n $DATA_PATH ]]; then
        split_data_path "$DATA_PATH"
        DATA_FLAGS+=(--data-path "${DATA_WORDS[@]}")
    fi
    [[ -n $VOCAB_FILE ]] && DATA_FLAGS+=(--vocab-file "$VOCAB_FILE")
    [[ -n $MERGE_FILE ]] && DATA_FLAGS+=(--merge-file "$MERGE_FILE")
    return 0
}

# split_data_path TEXT: sets the array DATA_WORDS: the words of a blend, or one path, blanks included.
split_data_path() {
    DATA_WORDS=("$1")
    if [[ ! -e $1.bin && ! -e $1.idx ]]; then read -ra DATA_WORDS <<<"$1"; fi
}

# start_python SCRIPT ARGS...: sets the array COMMAND, under torchrun only when there are several processes.
start_python() {
    COMMAND=("$PYTHON")
    if ((WORLD > 1)); then
        COMMAND+=(-m torch.distributed.run --nproc-per-node "$PROCESSES" --nnodes "${NNODES:-1}"
            --node-rank "${NODE_RANK:-0}" --master-addr "${MASTER_ADDR:-localhost}"
            --master-port "${MASTER_PORT:-6000}")
    fi
    COMMAND+=("$@")
}

# pass_signals COMMAND...: runs it and hands it what this script is sent; ends the script where that stopped it.
pass_signals() {
    local child name next seen status='' signals=0
    set -m # a group of its own: a signal to the script's group comes once, and Ctrl-C is not ignored
    MEGATRON_LAUNCHER_PID=$$ "$@" &
    child=$!
    set +m
    for name in HUP INT QUIT TERM USR1 USR2; do
        # shellcheck disable=SC2064
        trap "signals=\$((signals + 1)); kill -$name $child 2>/dev/null || true" "$name"
    done
    while true; do
        seen=$signals next=0
        wait "$child" || next=$?
        # 127: the wait before this one has had the status of the command.
        [[ $next == 127 && -n $status ]] || status=$next
        # A signal ends the wait, whether the command has ended or not.
        [[ $signals != "$seen" ]] || break
    done
    trap - HUP INT QUIT TERM USR1 USR2
    ((signals == 0)) || exit "$status"
    return "$status"
}

# count_processes: sets PROCESSES, one per device unless told otherwise, and WORLD.
count_processes() {
    PROCESSES=${NPROC_PER_NODE:-${GPUS_PER_NODE:-$((DEVICE_COUNT > 1 ? DEVICE_COUNT : 1))}}
    [[ $PROCESSES =~ ^[1-9][0-9]*$ ]] || die "NPROC_PER_NODE=$PROCESSES: a number of processes is needed"
    WORLD=$((PROCESSES * ${NNODES:-1}))
    if ((WORLD > 1)); then
        # Otherwise torchrun chooses one thread each, and says so in five lines.
        local cores
        cores=$(nproc 2>/dev/null) || cores=1
        export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > PROCESSES ? cores / PROCESSES : 1))}
    fi
    if ((WORLD > 1)) && [[ $DEVICE != cpu ]]; then
        # Communication is put before the compute it overlaps with only where one queue holds both.
        default_env CUDA_DEVICE_MAX_CONNECTIONS 1
    fi
}

# launch_gpt RECIPE ARGS...: train, then show what the model learned. RECIPE: plain, fp16 or bf16.
launch_gpt() {
    set -eo pipefail
    trap '' PIPE
    local recipe=$1
    shift
    case " $* " in *" --help "* | *" -h "*) usage && exit 0 ;; esac
    split_options "$@"
    find_python
    export PYTHONPATH="$REPO${PYTHONPATH:+:$PYTHONPATH}"
    find_device
    count_processes
    prepare_data

    source "$REPO/tests_gpt/recipes.sh"
    recipe_flags "$recipe"
    local save_flags=(--save "${CKPT_PATH:-$REPO/checkpoints/pretrain_gpt_$recipe}")
    # A first try of the default corpus starts afresh each time; real work goes on where it stopped.
    if [[ $EMBEDDED == 0 || -n $CKPT_PATH ]]; then
        save_flags+=(--load "${save_flags[1]}")
    fi
    local flags=("${RECIPE_FLAGS[@]}" "${DATA_FLAGS[@]}" "${save_flags[@]}"
        --pre-tockens "$PRE" --next-tockens "$NEXT" --shape-order "$SHAPE_ORDER" "${PASSED[@]}")
    say "device $DEVICE, $PROCESSES process(es), recipe $recipe, window --pre $PRE --next $NEXT $SHAPE_ORDER"
    start_python "$REPO/pretrain_gpt.py" "${flags[@]}"
    if [[ $EMBEDDED == 0 ]]; then
        exec "${COMMAND[@]}" # signals of a cluster's scheduler reach the trainer itself
    fi
    pass_signals "${COMMAND[@]}"
    local tensor pipeline
    tensor=$(last_value --tensor-model-parallel-size "${flags[@]}")
    pipeline=$(last_value --pipeline-model-parallel-size "${flags[@]}")
    show_sample "$(last_value --save "${flags[@]}")" "${tensor:-1}" "${pipeline:-1}"
}

# show_sample DIR TP PP: prints where the checkpoint is and a text generated from it.
show_sample() {
    [[ ${NODE_RANK:-0} == 0 ]] || return 0
    if [[ ! -e $1/latest_checkpointed_iteration.txt ]]; then
        say "no checkpoint in $1, so no sample"
        return
    fi
    say "checkpoint: $1, iteration $(cat "$1/latest_checkpointed_iteration.txt")"
    if [[ $2 != 1 || $3 != 1 ]]; then
        say "no sample: tools/generate.py reads checkpoints of one tensor rank and one pipeline stage"
        return
    fi
    local sample=("$PYTHON" "$REPO/tools/generate.py" --prompt 'def ' --load "$(readlink -f -- "$1")") line
    printf -v line '%q ' "${sample[@]}" # to be pasted in any directory
    say "sample: ${line% }"
    "${sample[@]}"
}

LAUNCH_FILE=$(readlink -f -- "${BASH_SOURCE[0]}")
REPO=${LAUNCH_FILE%/tests_gpt/*}
