"""LoRA on the frozen fused experts of mixture-of-experts models: storage, function, module, file layouts."""
