#!/usr/bin/env bash
# Two "hosts" on this machine: network namespaces joined by a pair of virtual interfaces, each with a disk of its
# own (a tmpfs that only its mount namespace sees). Run inside a fresh user, network and mount namespace:
#
#   unshare --user --map-root-user --net --mount --fork --kill-child two_hosts.sh LOGS DISK SOURCE COMMAND...
#
# Every host mounts its disk at DISK, copies SOURCE to DISK/data, runs COMMAND with NODE_RANK, MASTER_ADDR and
# GLOO_SOCKET_IFNAME set, and writes what it printed and a listing of its disk to LOGS. Status: the larger of the two.
set -eo pipefail
if [[ $1 != --host ]]; then
    hosts=() status=0
    for host in 0 1; do
        unshare --net --mount --uts "$0" --host "$host" "$@" &
        hosts+=($!)
    done
    ip link add veth0 type veth peer name veth1
    for host in 0 1; do
        # The namespace is new once the process has made it; until then this one is its own.
        until [[ $(readlink "/proc/${hosts[host]}/ns/net") != $(readlink /proc/self/ns/net) ]]; do sleep 0.05; done
        ip link set "veth$host" netns "${hosts[host]}"
    done
    for process in "${hosts[@]}"; do
        wait "$process" || status=$?
    done
    exit "$status"
fi

host=$2 logs=$3 disk=$4 source=$5
shift 5
hostname "host$host"
ip link set lo up
until ip link show "veth$host" >/dev/null 2>&1; do sleep 0.05; done
ip address add "10.77.0.$((host + 1))/24" dev "veth$host"
ip link set "veth$host" up
mount -t tmpfs tmpfs "$disk"
cp -r "$source" "$disk/data"
export NODE_RANK=$host MASTER_ADDR=10.77.0.1 GLOO_SOCKET_IFNAME=veth$host
status=0
"$@" >"$logs/host$host.log" 2>&1 || status=$?
(cd "$disk" && find . -type f | sort) >"$logs/host$host.files"
exit "$status"
