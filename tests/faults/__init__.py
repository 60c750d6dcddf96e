"""What is killed, cut short or left without room, and what comes of it."""

import os

# A fork takes no threads along, and would wait for ever for what one of them holds: before numpy and pyarrow
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("JE_ARROW_MALLOC_CONF", "background_thread:false")
