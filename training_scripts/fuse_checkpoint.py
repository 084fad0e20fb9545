"""Fuse a pre-training run into a stock ViT that transformers loads without this library.

python training_scripts/fuse_checkpoint.py outputs/demo --output_dir outputs/demo-fused
"""

from hf_dbp.fusing import main

if __name__ == "__main__":
    main()
