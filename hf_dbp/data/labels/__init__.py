"""Labels as people draw them, polygons in files of COCO, LabelMe, YOLO and CVAT, as index masks, and back."""
