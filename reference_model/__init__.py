"""DeepSeek-V4 in plain eager PyTorch: it imports torch and safetensors, and nothing of the compiler."""
