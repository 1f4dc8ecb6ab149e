"""Models of one file format quantized and written as another, a matrix at a time."""

from squall.convert.gguf import write_gguf
from squall.convert.imatrix import read_imatrix
from squall.convert.matrices import Importance, Written
from squall.convert.uqff import write_uqff

__all__ = ["Importance", "Written", "read_imatrix", "write_gguf", "write_uqff"]
