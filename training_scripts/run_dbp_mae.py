"""Pre-train a ViT by masked autoencoding with decorrelated backprop (or plain, for comparison).

    accelerate launch training_scripts/run_dbp_mae.py --config demo.yaml
    accelerate launch --multi_gpu training_scripts/run_dbp_mae.py --config imagenet10_dbp.yaml --train_dir IMAGES

Flags: those of transformers' run_mae.py, all TrainingArguments, and more; see --help.
"""

from hf_dbp.pretraining import main

if __name__ == "__main__":
    main()
