"""Number formats, reference ops and the loader of the CUDA kernels."""
