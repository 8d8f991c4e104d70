"""What every key of a recipe means, in a sentence: for editors (JSON Schema) and the reference."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

#: Class of the settings -> key -> what it means. A subclass has its parents' keys as well.
DESCRIPTIONS: dict[str, dict[str, str]] = {
    "Recipe": {
        "name": "Name of the study; its run folder is runs/NAME unless --out says otherwise.",
        "question": "What the study asks, in a sentence or two; it heads the report.",
        "task": "Problems, the evaluation sets, how a problem is asked and an answer checked.",
        "models": "Models by name; arms use `teacher` and `student` unless they name others.",
        "pools": "How many training problems go to which use.",
        "sampling": "How responses are drawn for training, unless a stage says otherwise.",
        "stages": "Defaults of each stage kind; an arm may override single keys.",
        "arms": "Routes for the labels by name; `paper` stands for every route of the paper.",
        "contrasts": "Pairs of arms to compare, and what they may differ in.",
        "hypotheses": "Statements made of contrasts; `paper` stands for the claims H1 to H7.",
        "map": "Two arms anew for every student and number of labels.",
        "evaluation": "Attempts at the evaluation sets, and how they are drawn.",
        "diagnostics": "Probes of how far a student is from its teacher.",
        "budget": "Limits on what training may spend, over the whole run.",
        "guards": "Thresholds at which training is warned of; null switches one off.",
        "compute": "Where and how it runs; changes no result but by rounding.",
        "report_to": "Trackers that are told of metrics, by name; none by default.",
        "log_completions": "Send trackers a table of completions every so many steps.",
        "seeds": "One training run of every arm for each.",
    },
    "Task": {
        "train": "Training problems: a file (.jsonl, .jsonl.gz, .json, .parquet), "
        "hf:ID[:CONFIG][:SPLIT], or task:NAME.",
        "worked": "Another source, for the pool of worked solutions.",
        "eval": "Evaluation sets by name: a source, a benchmark's name (gsm8k, math500, aime24, "
        "aime25, amc23), or pool:validation.",
        "columns": "Which columns of the data are problem, answer, id and solution.",
        "verifier": "math, exact, reasoning_gym, python:module:function or "
        "reward:module-or-file:function.",
        "prompt": "How the answer is asked for; checked against the verifier before training.",
        "verifier_workers": "Processes that grade.",
        "verifier_timeout_seconds": "Time for one answer; a longer one is TIMEOUT, not INCORRECT.",
        "verifier_correct_from": "The reward from which a reward function's answer is correct.",
    },
    "ModelSpec": {
        "source": "hf:ID-or-path, gguf:path, smollm2-135m, tiny:NAME, or prune:MODEL.",
        "layers": "Of prune: how many layers to keep, or which.",
        "lora": "Adapters that arms train it through; a number is a rank.",
        "prepare": "Stages (pretrain, sft) that make the base which every arm starts from.",
        "seed": "Makes the base once, with this seed, for all seeds of the study; by default each "
        "seed makes its own.",
    },
    "LoRA": {
        "rank": "Rank of the update of each adapted weight.",
        "alpha": "The update is scaled by alpha / rank; by default twice the rank.",
        "target_modules": "Linear layers by the end of their names, or all-linear.",
        "dropout": "Only 0: adapters are merged while they train.",
        "base": "full, or nf4: what 4-bit quantisation leaves of the weights.",
    },
    "ChainItem": {
        "kind": "The stage kind.",
        "pool": "The problems it reads; NAME:N is the first N of a pool.",
        "overrides": "Settings that differ from the recipe's defaults.",
    },
    "PoolSpec": {
        "labels": "Problems whose answers may be read.",
        "split": "Names of the equal parts of `labels`.",
        "prompts": "Problems without answers, for transfers.",
        "worked": "Problems with worked solutions, for sft.",
        "validation": "Problems kept from every stage, to evaluate on while choosing settings.",
        "seed": "Of the one shuffle that divides them.",
    },
    "Sampling": {
        "temperature": "Of the softmax that tokens are drawn from.",
        "max_new_tokens": "Longest response; a longer one is cut, and not taught an end.",
    },
    "EvaluationSampling": {
        "temperature": "Of the softmax; 0 takes the likeliest token.",
        "top_p": "Only the likeliest tokens that together have this probability.",
        "top_k": "Only so many of the likeliest tokens.",
    },
    "Stages": {
        "pretrain": "Makes an embedded base model.",
        "sft": "Cross-entropy on worked solutions.",
        "grpo": "GRPO with the verifier's reward: stages 1 and 3.",
        "warmup": "Forward KL on cached teacher rollouts: stage 2a.",
        "sample_sft": "Teacher samples as hard labels: the baseline.",
        "opd": "On-policy distillation: stage 2b.",
        "mixed": "A verifier's reward and a teacher's, mixed (Eq. 3).",
    },
    "TrainingStage": {
        "kind": "The stage kind.",
        "lr": "Peak learning rate of AdamW.",
        "schedule": "Of the learning rate after its warmup; linear and cosine end at a tenth.",
        "warmup_steps": "Optimiser steps over which the learning rate rises from 0.",
        "betas": "Of AdamW.",
        "weight_decay": "Decoupled, as in AdamW.",
        "grad_clip": "Largest norm of the whole gradient.",
        "micro_batch_tokens": "Tokens in one forward pass; changes memory, not the gradient.",
        "checkpoint_seconds": "Time between checkpoints.",
        "steps": "Steps; of epochs, where it is not set.",
        "batch_size": "Responses in an update.",
        "epochs": "Passes over the data.",
        "prompts_per_step": "Problems that a step draws.",
        "group_size": "Responses to each problem of a step (G).",
        "normalization": "What a loss is divided by: all tokens, tokens of each sequence, or "
        "the longest length allowed.",
        "importance_cap": "Upper bound of the weights that correct for sampler and trainer "
        "differing; null for none.",
        "overlap": "Draw the next step's rollouts before this step's update.",
        "sampling": "Instead of the recipe's `sampling`.",
        "targets": "What is read of the teacher: full, {kind: top_k, k: K}, or sampled.",
        "teacher_temperature": "Of the teacher's softmax in the loss.",
        "lora": "Adapters of this stage; false for none, null for the model's own.",
        "rollouts": "Teacher rollouts from outside the study: a server, or a cache.",
        "advantage": "Rewards minus the group's mean, divided by the group's standard deviation "
        "or not.",
        "clip_low": "Lower clip of the probability ratio: 1 minus this.",
        "clip_high": "Upper clip of the probability ratio: 1 plus this.",
        "updates_per_batch": "Optimiser updates on one batch of rollouts.",
        "teacher_rollouts_per_prompt": "Teacher responses to each prompt, sampled once and cached.",
    },
    "PretrainStage": {
        "worked": "Share of traces that are worked out.",
        "careless": "Share of traces with slips.",
        "guessed": "Share of traces with a guess for an answer.",
        "slip_rate": "How often a careless trace slips.",
    },
    "GRPOStage": {
        "kl": "KL penalty to the model the stage began with.",
        "dynamic_sampling": "Replace groups whose rewards are all equal.",
    },
    "MixedStage": {
        "lambda_": "Weight of the verifier's reward: a number, or how it moves.",
        "beta": "Scale of the teacher's term, whose weight is (1 - lambda) * beta.",
        "divergence": "What opd calls kl.",
        "kl": "KL penalty to the model the stage began with.",
    },
    "LambdaSchedule": {
        "start": "At the first step.",
        "end": "From step `over` on.",
        "schedule": "A straight line, half a cosine, or a step.",
        "over": "Steps until `end`; by default all.",
    },
    "OpenAITeacher": {
        "kind": "A server that speaks OpenAI's API.",
        "model": "The model's name there.",
        "base_url": "The server's address, up to /v1.",
        "api": "chat: its own template; completions: the student's token ids.",
        "key_variable": "Environment variable with the server's key.",
        "requests_in_flight": "Requests at once.",
        "request_seconds": "How long an answer may take.",
    },
    "CachedTeacher": {
        "kind": "Teacher rollouts on this disk.",
        "path": "Another run's artifact, or a .parquet file.",
    },
    "KLPenalty": {
        "coefficient": "Weight of the penalty; 0 computes none.",
        "estimator": "k2, k3 (from the sampled token), or exact (over the vocabulary).",
    },
    "DynamicSampling": {"max_rounds": "How often groups without signal are drawn anew."},
    "OPDStage": {"kl": "reverse, forward, or {kind: mixed, forward_weight: W}."},
    "FullVocabulary": {"kind": "The whole distribution."},
    "TopK": {"kind": "The k likeliest tokens, and the rest in one bucket.", "k": "How many."},
    "SampledToken": {"kind": "The sampled token's log-probability: a policy gradient."},
    "ReverseKL": {"kind": "KL(student || teacher)."},
    "ForwardKL": {"kind": "KL(teacher || student)."},
    "MixedKL": {"kind": "A weighted sum of both.", "forward_weight": "Weight of the forward KL."},
    "Arm": {
        "title": "Its name in tables; otherwise its route in words.",
        "teacher": "Stages that train the teacher; [] is the raw teacher.",
        "student": "Stages that train the student; an arm without it is about its teacher.",
        "teacher_model": "Which of `models` is the teacher.",
        "student_model": "Which of `models` is the student.",
        "teachers": "Other teachers by the source of the problems that they teach.",
    },
    "SourceTeacher": {
        "model": "Which of `models` it is.",
        "chain": "Stages that train it; [] is the raw model.",
    },
    "Contrast": {
        "better": "The arm expected to do better.",
        "than": "The arm it is compared with.",
        "differs_in": "What the two may differ in; whatever else does is refused.",
        "match": "Spend on `than` what `better` spends of this.",
        "not_worse_by": "Claim only that `better` is not behind by this share or more.",
    },
    "Hypothesis": {
        "statement": "What is claimed, in words.",
        "claims": "Contrasts that all have to hold.",
    },
    "MapSpec": {
        "rule": "The arm that follows the rule.",
        "against": "The arm it is compared with.",
        "students": "Models that take the student's place.",
        "labels": "How many labels both arms may read.",
    },
    "Evaluation": {
        "attempts": "Responses to each problem (k of avg@k).",
        "problems": "At most so many of each set.",
        "sampling": "How they are drawn; by default as in training.",
        "batch_prompts": "Problems of a batch, after which results are kept.",
    },
    "Diagnostics": {
        "prompts": "Problems of the transfer's pool that a probe asks; 0 for no probes.",
        "rollouts_per_prompt": "Student responses to each.",
        "positions": "Parts of a response that are told apart.",
        "sampling": "How they are drawn; by default as in training.",
    },
    "Budget": {
        "labels": "Distinct answers read.",
        "verifier_calls": "Answers graded.",
        "generated_tokens": "Tokens sampled.",
        "updates": "Optimiser updates.",
    },
    "Guards": {
        "window_steps": "Steps in a row beyond a threshold before it is told.",
        "no_signal_steps": "The same for no_signal_share.",
        "entropy_share": "The policy's entropy, below this share of that at the start.",
        "length_ratio": "Length of responses, above this many times that at the start.",
        "truncation_rate": "Share of responses cut at the limit, above this.",
        "repetition_rise": "Share of 4-grams that repeat, above the start's by more than this.",
        "no_signal_share": "Share of groups with equal rewards, above this.",
        "sampler_gap_nats": "Sampler against trainer, above this a token.",
        "kl_rise_nats": "KL to teacher or reference, above the start's by more than this.",
        "grad_norm_ratio": "Gradient norm, above this many times that at the start.",
    },
    "Compute": {
        "device": "auto, cpu or cuda.",
        "precision": "auto (bfloat16 where the device is faster at it), float32 or bfloat16.",
        "processes": "Independent stages at once; by default as many as fit.",
        "threads": "Of each stage; by default the cores shared out.",
        "deterministic": "On a GPU, only algorithms that give the same bits every time.",
        "ranks": "Processes that share each stage, a GPU each.",
        "retries": "How often a stage whose process was lost is started again.",
        "activation_checkpointing": "Compute layers again in the backward pass, to save memory.",
        "cpu_offload": "Sharded weights and optimiser state in the host's memory.",
        "rollouts": "Who samples: in_process, or vLLM.",
        "scoring": "Who scores with the teacher: in_process, or vLLM.",
    },
    "InProcess": {"kind": "The process that trains, with its own weights."},
    "VLLM": {
        "kind": "vLLM servers, or vLLM in the process that trains.",
        "in_process": "No server: vLLM's engine in the process that trains.",
        "urls": "Servers that run already; none: each stage starts its own.",
        "key_variable": "Environment variable with the key of the servers at `urls`.",
        "python": "Interpreter of the environment that vLLM is installed in.",
        "transfer": "How weights get to servers: folder, broadcast or ipc.",
        "requests_in_flight": "Requests to each server at once.",
        "request_seconds": "How long an answer may take.",
        "startup_seconds": "How long a start may take.",
        "max_model_len": "Tokens of prompt and response together.",
        "gpu_memory_utilization": "Share of a device's memory.",
        "cpu_cache_gib": "On a CPU, memory of the cache.",
        "sleeps": "Leave the device's memory between rollouts.",
        "extra_args": "More of the server's own arguments.",
    },
}


def description(model: type[BaseModel], key: str) -> str | None:
    """What `key` of these settings, or a key's alias, means; None where nobody has said it."""
    key = next((name for name, field in model.model_fields.items() if field.alias == key), key)
    for parent in model.__mro__:
        found = DESCRIPTIONS.get(parent.__name__, {}).get(key)
        if found is not None:
            return found
    return None


def described(schema: dict[str, Any], models: dict[str, type[BaseModel]]) -> dict[str, Any]:
    """A JSON Schema with a description at every key. models: its `$defs` by name."""
    for name, model in models.items():
        part = schema if name == schema["title"] else schema["$defs"].get(name, {})
        for key, value in part.get("properties", {}).items():
            if (words := description(model, key)) is not None:
                value["description"] = words
    return schema
