#!/usr/bin/env bash
# Models in inference, and training times beside the paper's, on one GPU: bash experiments/gpu_inference.sh FOLDER [PART ...]
# Parts, all of them where none is named, each a folder below FOLDER (one that is there is left out):
#   checks       do the forms agree on this device? float32; printed, checks.txt
#   resolutions  memory and time against resolution (the paper's figures 3 and 10)
#   chunk_size   the size of a chunk (figure 4)
#   lengths      three forms, memory against time; memory against length; the line through the recurrent form's (figures 1, 9 right)
#   times        training steps of the paper's three sizes over softmax attention's, beside the paper's column: a folder a size. Blocks are
#                compiled, by processes side by side first, whose graphs torch keeps on the disk; a size halves the images as it doubles the
#                width, so that the device has work for longer than the host
# PYTHON=... chooses the interpreter. After LIMIT seconds (440) the part that runs is stopped and keeps the sizes that it has measured; a form
# that takes longer than 10 seconds at a size is left, with an estimate of its time. About a megabyte in all. Where matplotlib is not
# installed, `lba-bench figures FOLDER/PART` draws the figures later. DEVICE=cpu SMALL=1 tries the script, and measures nothing worth keeping.
set -euo pipefail
folder=${1:?give a folder for the tables}
parts=${*:2}
parts=${parts:-checks resolutions chunk_size lengths times}
device=${DEVICE:-cuda}
limit=${LIMIT:-440}
bench=("${PYTHON:-python}" -m lba_exp.commands.bench)
if [ -n "${SMALL:-}" ]; then
    checks=(--presets softmax,lion_s,hydra model.width=16 model.heads=2 model.depth=1)
    images=(size=vit_tiny model.width=32 model.heads=2 model.depth=2 model.patch_size=8)
    sequences=(model.width=32 model.heads=2 model.depth=3)
    resolutions=32,64,128 middle=128 batch=2 chunks=8,16,32,64 lengths=512,768,1024
    options=(--repeats 1 --seconds 0.05 --cell-seconds 4)
    training=(model.width=16 model.heads=2 model.depth=1 model.patch_size=8 --resolution 32 --compile off)
    turns=(--repeats 1 --seconds 0.05) sizes="vit_base:2 vit_tiny:2"
else
    checks=(--presets softmax,lion_lit,lion_d,lion_s,lion_s_multiscan,hydra,vim)
    images=(size=vit_tiny)
    sequences=(model.width=192 model.heads=3 model.depth=12 model.mlp_ratio=4)
    resolutions=224,448,896,1248,2496 middle=1248 batch=64 chunks=16,32,64,128,256,512,1024
    lengths=256,512,1024,2048,4096,8192,16384,32768,65536
    options=(--dtype bfloat16 --repeats 1 --seconds 0.5 --cell-seconds 10)
    training=(--compile blocks)
    turns=(--repeats 3 --seconds 1) sizes="vit_base:128 vit_tiny:512 vit_small:256"
fi
failed=0

left() {  # seconds, at least 1: 0 would be no limit
    echo "$((limit > SECONDS ? limit - SECONDS : 1))"
}

run() {  # name of the folder, then the benchmark
    if [ -e "$folder/$1/table.md" ]; then
        echo "$folder/$1 is there already"
        return
    fi
    echo "== $1, after $SECONDS s"
    # SIGTERM: what was measured is written
    timeout --kill-after=30 "$(left)" "${bench[@]}" "${@:2}" --device "$device" --output "$folder/$1" || failed=1
}

for part in $parts; do
    case $part in
    checks)
        mkdir -p "$folder"
        timeout "$(left)" "${bench[@]}" presets "${checks[@]}" --device "$device" | tee "$folder/checks.txt" || failed=1
        ;;
    resolutions)
        run resolutions model softmax "lion_s model.mixer.form=parallel" "lion_s model.mixer.form=recurrent" \
            "lion_s model.mixer.form=chunkwise" "lion_s model.mixer.form=fused" "hydra model.mixer.form=fused" "vim model.mixer.form=fused" \
            "${images[@]}" --resolutions "$resolutions" --batch "$batch" "${options[@]}"
        ;;
    chunk_size)
        run chunk_size model lion_s "${images[@]}" --forms chunkwise,recurrent,fused --resolutions "$middle" --batch "$batch" \
            --chunk-sizes "$chunks" "${options[@]}"
        ;;
    lengths)
        run lengths model softmax lion_lit lion_s "${sequences[@]}" --lengths "$lengths" --batch 1 "${options[@]}"
        ;;
    times)
        for entry in $sizes; do
            size=${entry%:*} batch=${entry#*:}
            if [ -z "${SMALL:-}" ] && [ ! -e "$folder/times_$size/table.md" ]; then
                mkdir -p "$folder/compiling"
                for model in softmax lion_lit lion_d lion_d_multiscan lion_s lion_s_multiscan "hydra model.mlp_ratio=3" "vim model.mlp_ratio=3"; do
                    timeout "$(left)" "${bench[@]}" steps "$model" "size=$size" "${training[@]}" --batch "$batch" --repeats 1 --seconds 0.1 \
                        --device "$device" >"$folder/compiling/${size}_${model%% *}.txt" 2>&1 &
                done
                wait
            fi
            run "times_$size" times --sizes "$size" "${training[@]}" "${turns[@]}" --batch "$batch"
        done
        ;;
    *)
        echo "$part is no part: checks, resolutions, chunk_size, lengths, times" >&2
        exit 1
        ;;
    esac
done

echo "== short tables, after $SECONDS s"
for table in "$folder"/*/table.md; do
    if [ -e "$table" ]; then
        echo "# $table"
        sed -n '/^## /,$p' "$table" | sed '/^## Every cell/,$d' | grep -E '^(#|\|)' | grep -v '^| ---' || failed=1
    fi
done
exit "$failed"
