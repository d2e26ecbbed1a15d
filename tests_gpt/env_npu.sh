# Makes this shell ready for Ascend NPUs; source it, from any directory:  source tests_gpt/env_npu.sh
#
# Finds CANN and reads its set_env.sh, adds the driver's libraries, and gives values to variables that have
# none. Everything it sets it prints, but MEGATRON_NPU_ENVIRONMENT, which tells error messages what it found
# (no-npu, no-cann or cann). It needs no root, changes no file, and sets nothing else on a machine without an
# NPU (MEGATRON_DEVICE=npu says that there is one). Sourcing it twice is harmless.
#
# CANN_SET_ENV=FILE names a set_env.sh in an unusual place.

npu_say() { printf 'env_npu: %s\n' "$*"; }

# npu_default NAME VALUE: exports NAME unless it has a value, and says so.
npu_default() {
    [[ -n ${!1:-} ]] && return 0
    export "$1=$2"
    npu_say "set $1=$2"
}

# npu_is_here: whether the machine, or the container, has a card.
npu_is_here() {
    [[ ${MEGATRON_DEVICE:-} == npu* ]] && return 0
    local file
    for file in "${DEV_DIR:-/dev}"/davinci*; do
        [[ -e $file ]] && return 0
    done
    return 1
}

# npu_cann_candidates: prints the places of set_env.sh, best first.
npu_cann_candidates() {
    local root name installed= info=${ASCEND_INSTALL_INFO:-/etc/Ascend/ascend_cann_install.info}
    if [[ -n ${CANN_SET_ENV:-} ]]; then
        printf '%s\n' "$CANN_SET_ENV"
        return
    fi
    for root in "${ASCEND_HOME_PATH:-}" "${ASCEND_TOOLKIT_HOME:-}"; do
        [[ -n $root ]] && printf '%s\n' "$root/set_env.sh" "${root%/*}/set_env.sh"
    done
    [[ -r $info ]] && installed=$(sed -n 's/^Install_Path=//p' "$info" | head -n 1)
    for root in "$installed" "${ASCEND_ROOT:-/usr/local/Ascend}" "${HOME:+$HOME/Ascend}"; do
        for name in cann ascend-toolkit nnae; do
            [[ -n $root ]] && printf '%s\n' "${root%/}/$name/set_env.sh"
        done
    done
    return 0
}

# npu_source_cann: reads CANN's set_env.sh unless the environment has it already.
npu_source_cann() {
    if [[ -n ${ASCEND_HOME_PATH:-} && ":${LD_LIBRARY_PATH:-}:" == *":$ASCEND_HOME_PATH/"* ]]; then
        npu_say "CANN: $ASCEND_HOME_PATH, already in the environment"
        export MEGATRON_NPU_ENVIRONMENT=cann
        return
    fi
    local file found=
    while IFS= read -r file; do
        if [[ -r $file ]]; then
            found=$file
            break
        fi
    done < <(npu_cann_candidates)
    if [[ -z $found ]]; then
        npu_say "CANN: no set_env.sh found, going on without; CANN_SET_ENV=FILE names one"
        export MEGATRON_NPU_ENVIRONMENT=no-cann
        return
    fi
    npu_say "CANN: $found"
    export MEGATRON_NPU_ENVIRONMENT=cann
    local flags=$-
    set +eu # not ours: it may end with a test that fails, or read variables that are not set
    # shellcheck disable=SC1090
    source "$found"
    [[ $flags != *e* ]] || set -e
    [[ $flags != *u* ]] || set -u
    npu_say "set ASCEND_HOME_PATH=${ASCEND_HOME_PATH:-} and what else that file sets"
}

# npu_add_driver: lets the linker find the driver, which set_env.sh leaves to the system's configuration.
npu_add_driver() {
    local root=${ASCEND_ROOT:-/usr/local/Ascend}/driver/lib64 directory
    for directory in "$root" "$root/common" "$root/driver"; do
        if [[ -d $directory && ":${LD_LIBRARY_PATH:-}:" != *":$directory:"* ]]; then
            export LD_LIBRARY_PATH=${LD_LIBRARY_PATH:+$LD_LIBRARY_PATH:}$directory
            npu_say "added $directory to LD_LIBRARY_PATH"
        fi
    done
}

npu_environment() {
    if ! npu_is_here; then
        npu_say "no NPU: there is no ${DEV_DIR:-/dev}/davinci*, so nothing is set; MEGATRON_DEVICE=npu says that there is one"
        export MEGATRON_NPU_ENVIRONMENT=no-npu
        return 0
    fi
    npu_source_cann
    npu_add_driver
    # Ranks of a big job arrive minutes apart; CANN's own limit is two.
    npu_default HCCL_CONNECT_TIMEOUT 1200
    # The allocator reads one of two names and refuses both at once.
    [[ -n ${PYTORCH_ALLOC_CONF:-} ]] || npu_default PYTORCH_NPU_ALLOC_CONF expandable_segments:True
}

npu_environment
