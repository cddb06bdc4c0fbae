#!/usr/bin/env bash
# One machine without a scheduler:
#
#     recipes/torchrun/single_node.sh configs/llama3_2_1b_dint.yaml output_dir=/data/run
#
# DRY_RUN=1                 print the command, start nothing
# PYTHON=/path/to/python    of the environment with lrdint_tune; default: python
# NPROC_PER_NODE=gpu        processes, or gpu for one on each GPU
# MAX_RESTARTS=3            how often killed processes may be replaced
set -euo pipefail

config=${1:?usage: single_node.sh CONFIG [key=value ...]}
shift

command=(
    "${PYTHON:-python}" -m lrdint_tune.launch
    --nproc_per_node "${NPROC_PER_NODE:-gpu}" --max-restarts "${MAX_RESTARTS:-3}"
    -m lrdint_tune.full_finetune_distributed --config "$config" resume=auto "$@"
)
if [[ ${DRY_RUN:-0} == 1 ]]; then
    printf '%q ' "${command[@]}"
    echo
    exit 0
fi
exec "${command[@]}"
