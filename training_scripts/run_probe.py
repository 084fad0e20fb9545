"""Probe a frozen stock ViT on a labelled image set: k nearest neighbours and a linear classifier, with intervals.

    python training_scripts/run_probe.py --model_name_or_path VIT --train_dir FOLDER --output_file probe.json

FOLDER, or each of its `train` and `validation`, holds one folder of images per class, or parquet files.
`--from_scratch` probes random weights of the same shape.
"""

from hf_dbp.downstream.probe import main

if __name__ == "__main__":
    main()
