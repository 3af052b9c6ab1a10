"""Weights and routers shipped with tcc, and the reader of the data set that they were trained on."""
