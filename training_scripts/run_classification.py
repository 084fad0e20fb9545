"""Fine-tune an image classifier from an encoder; its flags: --help, or docs/flags.md.

    python training_scripts/run_classification.py --train_dir IMAGES --model_name_or_path outputs/demo-fused --do_train
    accelerate launch training_scripts/run_classification.py ...

The flags are those of `hf-dbp classify`.
"""

from hf_dbp.downstream.classification.finetuning import main

if __name__ == "__main__":
    main()
