"""Prefill on Hopper, written in Gluon: warps that load, prepare chunks and keep the state work side by side."""
