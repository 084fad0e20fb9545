"""Fine-tune an object detector, with masks if asked for; its flags: --help, or docs/flags.md.

    python training_scripts/run_detection.py --train_dir IMAGES --train_mask_dir LABELS
        --model_name_or_path outputs/demo-fused --do_train
    accelerate launch training_scripts/run_detection.py ...

The flags are those of `hf-dbp detect`.
"""

from hf_dbp.downstream.detection.finetuning import main

if __name__ == "__main__":
    main()
