r"""Compare ways of pre-training on your own images: plan, run what is missing, report with statistics and figures.

    python training_scripts/run_comparison.py --plan compare_methods.yaml --output_dir outputs/comparison \
        --train_dir IMAGES
    python training_scripts/run_comparison.py --runs outputs/bp-* outputs/dbp-* --output_dir outputs/comparison

Repeat the command to resume an interrupted comparison. See --help; further flags are those of run_dbp_mae.py.
"""

from hf_dbp.comparison.runner import main

if __name__ == "__main__":
    main()
