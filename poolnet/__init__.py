"""poolnet: which pooling layer loses less?

Importing the package imports nothing heavy, so that `poolnet --help` is instant; take what you need from the
modules: `poolnet.data`, `poolnet.model`, `poolnet.train`, `poolnet.tracking`.
"""
