"""Checkpoint surgery: read, quantize, put the MTP head back, verify."""
