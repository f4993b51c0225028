"""What tinydiff asks of ``cupy_backends``: where cuBLAS is."""
