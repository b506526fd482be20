"""Greedy answers from plain vLLM, float32, as JSON on the last line: python plain_vllm_greedy.py MODEL PROMPTS NUM."""

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

    folder, prompts, num_tokens = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
    llm = LLM(model=folder, dtype="float32", enforce_eager=True, max_model_len=256, max_num_seqs=8)
    outputs = llm.generate(
        [{"prompt_token_ids": prompt} for prompt in prompts],
        SamplingParams(max_tokens=num_tokens, temperature=0.0),
        use_tqdm=False,
    )
    print(json.dumps([list(output.outputs[0].token_ids) for output in outputs]))
