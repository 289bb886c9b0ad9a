#!/bin/bash
#
# Runs a binary on a slice of a TPU pod: one process on each of its machines.
#
#   export TPU=mine ZONE=us-east5-b ACCELERATOR=v6e-64 RUNTIME=v2-alpha-tpuv6e
#   launch/tpu_pod.sh create                  # asks for the slice, in the queue
#   launch/tpu_pod.sh status                  # until it says ACTIVE
#   launch/tpu_pod.sh install dist/ancestral-0.1-py3-none-any.whl configs
#   launch/tpu_pod.sh run ancestral.launch.train --config=configs/arithmetic.py --workdir=/mnt/runs/a
#   launch/tpu_pod.sh fetch /mnt/runs/a .     # the folder, from the first machine
#   launch/tpu_pod.sh delete                  # and all that is only on it
#
# `install` makes a virtual environment of the wheel (from `python -m build --wheel`) on every
# machine, and copies there what else it is given, such as configs. `run` adds --distributed, which
# joins the processes, and waits for the end. The same command resumes, on a new slice too.
#
# The workdir is a folder that all machines see. With NFS=host:/share, such as Filestore's, `install`
# mounts the share at /mnt/runs. A slice of one machine needs none.
#
#   TPU           name of the slice
#   ZONE          its zone
#   ACCELERATOR   for `create`: its type
#   RUNTIME       for `create`: the version of its software, which goes with the type
#   SPOT=1        for `create`: cheaper, may be taken away at any time
#   NFS           for `install`: see above
#   DRY_RUN=1     print the commands instead
#
# On GKE the processes are the pods of a JobSet on a node pool of TPUs, each with the same command:
# python -m ancestral.launch.train --distributed ... JAX reads there who they are.

set -euo pipefail

readonly VENV=ancestral_venv  # in the home folder of every machine

fail() {
  echo "error: $1" >&2
  exit 2
}

perform() {
  if [[ -n "${DRY_RUN:-}" ]]; then
    printf '%q ' "$@"
    printf '\n'
  else
    "$@"
  fi
}

tpus() {
  perform gcloud compute tpus "$@" --zone="$ZONE"
}

everywhere() {
  tpus tpu-vm ssh "$TPU" --worker=all --command="$1"
}

create() {
  : "${ACCELERATOR:?such as v6e-64}" "${RUNTIME:?such as v2-alpha-tpuv6e}"
  local options=(--node-id="$TPU" --accelerator-type="$ACCELERATOR" --runtime-version="$RUNTIME")
  if [[ -n "${SPOT:-}" ]]; then
    options+=(--spot)
  fi
  tpus queued-resources create "$TPU" "${options[@]}"
}

install() {
  (($# > 0)) || fail "install: give the wheel, and what else to copy."
  [[ "$1" == *.whl ]] || fail "install: $1 is no wheel: give the wheel first."
  local wheel venv
  wheel=$(printf '%q' "$(basename -- "$1")")
  tpus tpu-vm scp --recurse --worker=all "$@" "$TPU:"
  venv="python3 -m venv $VENV && $VENV/bin/python -m pip install --upgrade --quiet"
  everywhere "$venv ./$wheel 'jax[tpu]'"
  if [[ -n "${NFS:-}" ]]; then
    local share
    share=$(printf '%q' "$NFS")
    everywhere "sudo apt-get install --yes --quiet nfs-common && sudo mkdir -p /mnt/runs && \
(mountpoint --quiet /mnt/runs || sudo mount $share /mnt/runs) && sudo chmod a+rwx /mnt/runs"
  fi
}

run() {
  (($# > 0)) || fail "run: give a binary, such as ancestral.launch.train, and its flags."
  local arguments
  printf -v arguments ' %q' "$@"
  everywhere "$VENV/bin/python -m$arguments --distributed"
}

fetch() {
  (($# == 2)) || fail "fetch: give a folder there and a folder here."
  tpus tpu-vm scp --recurse --worker=0 "$TPU:$1" "$2"
}

status() {
  tpus queued-resources describe "$TPU" --format='value(state.state)'
}

delete() {
  tpus queued-resources delete "$TPU" --force --quiet
}

case "${1:-}" in
  create | status | install | run | fetch | delete) ;;
  *) fail "${1:-nothing} is not one of create, status, install, run, fetch, delete." ;;
esac
: "${TPU:?the name of the slice}" "${ZONE:?its zone}"
"$@"
