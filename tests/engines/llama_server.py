"""llama.cpp's HTTP server on one GGUF file, from the prebuilt package `xllamacpp`; runs until it is stopped.

python llama_server.py MODEL.gguf PORT '{"threads": 1, "slots": 2, "context": 2048, "exact": true}'
"""

import json
import signal
import sys

import xllamacpp

options = json.loads(sys.argv[3])
params = xllamacpp.CommonParams()
params.model.path, params.port = sys.argv[1], int(sys.argv[2])
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = options["threads"]
params.n_parallel, params.n_ctx = options["slots"], options["context"]
params.fit_params = params.ui = False
if options["exact"]:
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
server = xllamacpp.Server(params)
print("listening on", server.listening_address, flush=True)
signal.pause()
