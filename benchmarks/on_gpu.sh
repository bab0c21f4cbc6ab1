#!/usr/bin/env bash
# Speed, training and robustness at 224 px on one GPU, in two calls of at most eight minutes; no notebook, no network.
#
#   benchmarks/on_gpu.sh speed DATA OUT     attacks beside torchattacks, epochs beside their floor, fp32 and bf16
#   benchmarks/on_gpu.sh train DATA OUT     three backbones trained, hardened and attacked by the standard suite
#   benchmarks/on_gpu.sh smoke phantom OUT  both, as small as they go, on a CPU
#
# DATA is a folder or archive of images, or phantom. OUT gets records, figures, logs and, from train, files
# weights.part00, weights.part01, ... of at most 15 MiB each; `cat OUT/weights.part* | tar xf -` joins them.
#
# ENCODERS=FOLDER   starts from FOLDER/{efficientnet_b0,dino_v2,resnet34}.safetensors where they are, else from scratch
# BACKBONES="..."   only these, in this order
# KEEP="..."        models whose weights are packed, as far as PARTS files go (default 4)
# WHEELS=FOLDER     Python packages to install first, for a machine without them
# PYTHON=python3    the interpreter
set -euo pipefail
[ $# -eq 3 ] || { sed -n '2,16s/^# \{0,1\}//p' "$0"; exit 2; }
part=$1 data=$2 out=$3
python=${PYTHON:-python3}
backbones=${BACKBONES:-efficientnet_b0 resnet34 dino_v2}
keep=${KEEP:-EfficientNetB0 EfficientNetB0_atk ResNet34_atk DINOv2_atk}
cd "$(dirname "$0")/.."
mkdir -p "$out"
out=$(cd "$out" && pwd)
work=${WORK:-$(mktemp -d)}
case $part in
speed | train)
  side=224 clean=8 harden=6 batch=128 slices=8 attacked=160 suite=standard panel=128 extra=()
  images=512 few=128 repeats=3 epoch=8 rows="PGD-10 PGD-50x5" precisions="fp32 bf16"
  ;;
smoke)
  side=32 clean=1 harden=1 batch=8 slices=1 attacked=8 suite=smoke panel=0 extra=(--max-images 8)
  images=4 few=4 repeats=0 epoch=1 rows=PGD-10 precisions=fp32
  ;;
*) echo "error: no part $part; there are speed, train and smoke" >&2; exit 2 ;;
esac
if [ -n "${WHEELS:-}" ]; then
  "$python" -m pip install -q --no-index --no-deps --target "$work/site" "$WHEELS"/*.whl
  export PYTHONPATH="$work/site${PYTHONPATH:+:$PYTHONPATH}"
fi

step() { # NAME WORD... : run, with its own log, and say how long it took
  local name=$1 begun=$SECONDS
  shift
  "$@" >"$out/log_$name.txt" 2>&1 || { tail -n 5 "$out/log_$name.txt" >&2; echo "error: $name failed" >&2; return 1; }
  echo "$name: $((SECONDS - begun)) s"
}
title() { case $1 in efficientnet_b0) echo EfficientNetB0 ;; resnet34) echo ResNet34 ;; dino_v2) echo DINOv2 ;; *) return 1 ;; esac; }
start() { [ -n "${ENCODERS:-}" ] && [ -f "$ENCODERS/$1.safetensors" ] && echo "$ENCODERS/$1.safetensors" || echo scratch; }
utils() { "$python" -m utils "$@"; }

fitted() { # BACKBONE EPOCHS : a clean model
  utils train --backbone "$1" --data "$work/data" --out "$work/checkpoints/$(title "$1")" --image-size $side \
    --weights "$(start "$1")" --set "num_epochs=$2" --set "batch_size=$batch" --set learning_rate=5e-4 \
    --set label_smoothing=0.1 --set "slices_per_patient=$slices"
}
hardened() { # BACKBONE : its twin
  utils train --backbone "$1" --data "$work/data" --out "$work/checkpoints/$(title "$1")_atk" --recipe n_fgsm \
    --start "$work/checkpoints/$(title "$1")" --set eps=2/255 --set "num_epochs=$harden" --set "batch_size=$batch" \
    --set learning_rate=5e-4 --set "slices_per_patient=$slices" --set "validation_images=$attacked"
}
attacked() { # TITLE
  utils robustness --root "$work" --data "$work/data" --model "$1" --suite $suite --epsilons 1/255 2/255 \
    --batch-size $((4 * batch)) --panel-images $panel --out "$out/robustness_$1.json" "${extra[@]}"
}
one() { # BACKBONE : all of one backbone, one step after the other
  local name
  name=$(title "$1")
  step "train_$name" fitted "$1" $clean
  step "harden_$name" hardened "$1"
  for model in "$name" "${name}_atk"; do
    step "robustness_$model" attacked "$model"
    cp "$work/checkpoints/$model/record.json" "$out/record_$model.json"
  done
}

measure_speed() {
  for backbone in $backbones; do
    [ -f "$work/checkpoints/$(title "$backbone")/record.json" ] || step "start_$backbone" fitted "$backbone" 1
  done
  # shellcheck disable=SC2046,SC2086
  step attack_speed "$python" -m benchmarks.attack_speed --root "$work" --data "$work/data" --rows $rows \
    --models $(for backbone in $backbones; do title "$backbone"; done) --images $images --few-images $few \
    --batch-size $batch --repeats $repeats --name attack_speed_gpu --out "$out"
  for precision in $precisions; do
    # shellcheck disable=SC2086
    step "training_speed_$precision" "$python" -m benchmarks.training_speed --backbones $backbones --image-size $side \
      --images $((epoch * batch)) --batch-size $batch --precision $precision --repeats $repeats \
      --name "training_speed_gpu_$precision" --out "$out"
  done
}
train_all() {
  local running=() status=0
  for backbone in $backbones; do
    one "$backbone" &
    running+=($!)
  done
  for process in "${running[@]}"; do wait "$process" || status=1; done
  return $status
}
pack() { # weights in the order of KEEP, as far as PARTS files of 15 MiB go; what is left out is said
  local room=$((${PARTS:-4} * 15 * 1048576 - 1048576)) chosen=() size
  for model in $keep; do
    [ -f "$work/checkpoints/$model/weights.safetensors" ] || continue
    size=$(stat -c %s "$work/checkpoints/$model/weights.safetensors")
    if [ "$size" -gt "$room" ]; then echo "weights of $model left out: no room"; continue; fi
    room=$((room - size))
    chosen+=("checkpoints/$model")
  done
  [ ${#chosen[@]} -eq 0 ] || tar -C "$work" -cf - "${chosen[@]}" | split -b 15M -d - "$out/weights.part"
}

"$python" -c 'import torch; print("GPU" if torch.cuda.is_available() else "CPU", torch.cuda.get_device_name(0) if torch.cuda.is_available() else "")'
step prepare utils prepare --source "$data" --split patient --out "$work/data"
[ "$part" = speed ] || train_all
[ "$part" = train ] || measure_speed
[ "$part" = speed ] || pack
# few files travel better than many
tar -C "$out" -czf "$out/logs.tar.gz" $(cd "$out" && ls log_*.txt) && rm "$out"/log_*.txt
[ "$part" = speed ] || { tar -C "$out" -czf "$out/records.tar.gz" $(cd "$out" && ls record_*.json robustness_*.json); rm "$out"/record_*.json "$out"/robustness_*.json; }
echo "done in $SECONDS s: $(ls "$out" | tr '\n' ' ')"
