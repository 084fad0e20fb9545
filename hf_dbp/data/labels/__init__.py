"""Labels as people draw them (COCO, LabelMe, YOLO and CVAT files) to index masks, and back."""
