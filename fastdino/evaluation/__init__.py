"""What a backbone has learned, measured without training anything on top of it: one file per protocol.

`features` turns images into feature vectors, `knn` classifies by nearest neighbours, `attention` shows where
the heads of the last block look, `jaccard` compares that with ground-truth masks. ``python -m
fastdino.evaluation --help`` is the command line.
"""
