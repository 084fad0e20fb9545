r"""Fine-tune UperNet or EoMT (--head) for semantic segmentation from a stock ViT: fused DBP, BP, supervised or random.

    accelerate launch training_scripts/run_upernet.py --config demo_upernet.yaml --model_name_or_path VIT
    accelerate launch --multi_gpu training_scripts/run_upernet.py --config ade20k10_upernet.yaml \
        --model_name_or_path VIT

Flags: the data's and the model's, and all TrainingArguments; see --help.
"""

from hf_dbp.downstream.segmentation.finetuning import main

if __name__ == "__main__":
    main()
