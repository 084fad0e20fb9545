"""`hf-dbp inspect`: what a folder of images and masks contains, how it will be used, and a recipe to start from."""
