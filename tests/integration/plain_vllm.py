"""Prompt log-probabilities from plain vLLM, as JSON on the last line: python plain_vllm.py MODEL TOKEN_IDS."""

import json
import os
import sys

os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "TORCHDYNAMO_DISABLE": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
}

if __name__ == "__main__":
    from vllm import LLM, SamplingParams

    folder, token_ids = sys.argv[1], json.loads(sys.argv[2])
    llm = LLM(model=folder, dtype="float32", enforce_eager=True, max_model_len=128, max_num_seqs=8)
    sampling = SamplingParams(max_tokens=1, prompt_logprobs=0, temperature=0.0)
    (output,) = llm.generate([{"prompt_token_ids": token_ids}], sampling, use_tqdm=False)
    pairs = zip(token_ids[1:], output.prompt_logprobs[1:], strict=True)
    print(json.dumps([entry[token_id].logprob for token_id, entry in pairs]))
