"""Runs under the interpreter that has vllm and imports nothing of this project: vllm_worker.py REQUEST RESPONSES."""

import json
import os
import sys


def main(asked: str, answered: str) -> None:
    with open(asked) as file:
        request = json.load(file)
    import torch

    on_cpu = not torch.cuda.is_available()
    if on_cpu:
        os.environ.setdefault("VLLM_HOST_IP", "127.0.0.1")
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    from vllm import LLM, SamplingParams

    own, policy = {}, {}
    if adapter := request["adapter"]:
        from vllm.lora.request import LoRARequest

        own = {"enable_lora": True, "max_loras": 1, "max_lora_rank": request["rank"]}
        policy = {"lora_request": LoRARequest("policy", 1, adapter)}
    model = LLM(
        request["model"],
        dtype=request["dtype"],
        seed=request["seed"],
        max_model_len=request["max_length"],
        enforce_eager=on_cpu,
        skip_tokenizer_init=True,
        trust_remote_code=False,
        tensor_parallel_size=request["tensor_parallel"],
        **own,
    )
    sampling = [
        SamplingParams(
            temperature=request["temperature"],
            top_p=request["top_p"],
            max_tokens=room,
            stop_token_ids=request["stop_ids"],
            seed=seed,
            detokenize=False,
        )
        for seed, room in zip(request["seeds"], request["max_tokens"], strict=True)
    ]
    prompts = [{"prompt_token_ids": ids} for ids in request["prompts"]]
    # vllm divides by a bar's time, 0 under TQDM_DISABLE
    outputs = model.generate(prompts, sampling, use_tqdm=False, **policy)
    rows = [list(output.outputs[0].token_ids) for output in outputs]
    with open(answered + ".part", "w") as file:
        json.dump(rows, file)
    os.replace(answered + ".part", answered)


if __name__ == "__main__":
    main(*sys.argv[1:])
