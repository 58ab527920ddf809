"""Ray Serve LLM with vLLM on CPU, as its documentation has it: `python -m benchmarks.peers.ray_serve_llm MODEL PORT
[pd]`. With pd: `build_pd_openai_app`, one replica for prompts and one for answers, NIXL between them.
"""

from __future__ import annotations

import sys
import time

NAME, MAX_MODEL_LEN, MAX_NUM_SEQS = "served", 512, 32


def main(model: str, port: int, split: bool) -> None:
    import ray
    from ray import serve as ray_serve
    from ray.serve.llm import LLMConfig, build_openai_app, build_pd_openai_app

    from benchmarks.peers.vllm_generate import environment

    variables = {k: v for k, v in environment(threads=1, intel_openmp=False).items() if v is not None}
    ray.init(num_cpus=8, include_dashboard=False, log_to_driver=True, runtime_env={"env_vars": variables})

    def config(**more: object) -> LLMConfig:
        engine = {"dtype": "float32", "enforce_eager": True, "max_model_len": MAX_MODEL_LEN}
        return LLMConfig(
            model_loading_config={"model_id": NAME, "model_source": model},
            accelerator_type=None,
            placement_group_config={"bundles": [{"CPU": 1}]},
            deployment_config={"num_replicas": 1},
            engine_kwargs={**engine, "max_num_seqs": MAX_NUM_SEQS, **more},
            runtime_env={"env_vars": variables},
        )

    if split:
        kv = {"kv_connector": "NixlConnector", "kv_role": "kv_both", "kv_buffer_device": "cpu"}
        app = build_pd_openai_app(
            {"prefill_config": config(kv_transfer_config=kv), "decode_config": config(kv_transfer_config=kv)}
        )
    else:
        app = build_openai_app({"llm_configs": [config()]})
    ray_serve.start(http_options={"host": "127.0.0.1", "port": port})
    ray_serve.run(app, blocking=False)
    print("started", flush=True)
    while True:
        time.sleep(1)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), "pd" in sys.argv[3:])
