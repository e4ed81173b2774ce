#!/usr/bin/env bash
# The GPU's tables of the operator and of ViT-B/16: bash experiments/gpu_speed.sh FOLDER [FORM]; PYTHON=... chooses the interpreter.
# FORM (auto) is the form of the linear models, FORMS=... what the operator's tables compare. Each benchmark writes a folder of its own
# below FOLDER; one that is there is left out. Needs flash-linear-attention (pip install 'lba-exp[fla]') for the forms fla and fla-x2.
set -euo pipefail
folder=${1:?give a new folder for the tables}
form=${2:-auto}
forms=${FORMS:-fused,chunkwise,parallel,fla,fla-x2}
bench=("${PYTHON:-python}" -m lba_exp.commands.bench)

run() {  # name of the folder, then the benchmark
    if [ -e "$folder/$1/table.md" ]; then
        echo "$folder/$1 is there already"
    else
        "${bench[@]}" "${@:2}" --device cuda --output "$folder/$1"
    fi
}

# the operator at a constant number of tokens, one decay a run: flash-linear-attention tunes a kernel at its first call, which takes minutes in all
for decay in none fixed selective; do
    run "operator_$decay" operator --decays "$decay" --dtypes bfloat16 --tokens 131072 --heads 12 --lengths 197,1024,4096,16384,65536 \
        --forms "$forms"
done
# one sequence of a million tokens
run operator_million operator --decays selective --dtypes bfloat16 --batch 1 --heads 4 --lengths 1048576 --forms fused --no-softmax
# a training step against its softmax twin: 197, 3,137 and 24,337 tokens
run steps_224 steps softmax lion_lit lion_d lion_s lion_s_multiscan --form "$form" --resolution 224 --batch 128 --compile graphs --profile
run steps_224_blocks steps softmax lion_lit lion_d lion_s lion_s_multiscan --form "$form" --resolution 224 --batch 128 --compile blocks
run steps_224_eager steps softmax lion_lit lion_d lion_s lion_s_multiscan --form "$form" --resolution 224 --batch 128 --compile off
run steps_896 steps softmax lion_s --form "$form" --resolution 896 --batch 8 --compile graphs
run steps_2496 steps softmax lion_s --form "$form" --resolution 2496 --batch 1 --compile graphs
