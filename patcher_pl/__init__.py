"""patcher_pl: adversarial training of open-weight language models against malicious fine-tuning."""

__version__ = "0.1.0"
