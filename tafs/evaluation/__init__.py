"""Evaluation of a run: images (`generate`), scores (`evaluate`), server scores (`served`).

`checkpoint` judges any model and adapter under a `protocol`; `image_scores` scores image files.
"""
