"""`hf-dbp inspect`: what a folder of images and masks holds, what is done with it, and the recipe to start from."""
