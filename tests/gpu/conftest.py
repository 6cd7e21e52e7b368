"""Says why nothing runs where there is no GPU."""

import torch


def pytest_terminal_summary(terminalreporter):
    if not torch.cuda.is_available():
        build = torch.version.cuda or torch.version.hip or "the CPU alone"
        terminalreporter.write_line(
            f"tests/gpu: skipped, for torch sees no CUDA or ROCm device (torch {torch.__version__}, built for {build})"
        )
    else:
        names = ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
        terminalreporter.write_line(f"tests/gpu: on {names}; torch {torch.__version__}")
