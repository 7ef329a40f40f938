"""What is used of `mlx_lm.server`'s private parts; a test holds it against what is installed."""

SEAM = {
    "run": ("host", "port", "model_provider", "server_class", "handler_class"),
    "_run_http_server": ("host", "port", "response_generator", "server_class", "handler_class"),
    "ResponseGenerator._run_generate": ("self",),
    "ResponseGenerator._next_request": ("self", "timeout"),
    "ResponseGenerator._tokenize": ("self", "tokenizer", "request", "args"),
    "ResponseGenerator._serve_single": ("self", "request", "stream"),
    "ResponseGenerator._is_batchable": ("self", "args"),
    "ResponseGenerator.generation_available": ("self",),
    "ResponseGenerator.generate": (
        "self",
        "request",
        "generation_args",
        "progress_callback",
    ),
    "ResponseGenerator.stop_and_join": ("self",),
    "BatchGenerator.next": ("self",),
    "BatchGenerator.remove": ("self", "uids", "return_prompt_caches"),
    "TimeBudget.__iter__": ("self",),
    "TimeBudget.__next__": ("self",),
    "ModelProvider.reset": ("self",),
    "ModelProvider.load": ("self", "model_path", "adapter_path", "draft_model_path"),
    "ModelProvider.load_default": ("self",),
    "ModelProvider._load": ("self", "model_path", "adapter_path", "draft_model_path"),
    "APIHandler.handle_completion": ("self", "request", "stop_words"),
    "APIHandler._set_completion_headers": ("self", "status_code"),
    "APIHandler._set_stream_headers": ("self", "status_code"),
}
"""What of mlx_lm.server is replaced or called, with its parameters."""
