# A Space of Hugging Face that shows app.py and has the kernels for CPUs compiled.
FROM python:3.12
RUN useradd --create-home --uid 1000 user
USER user
WORKDIR /home/user/app
ENV HOME=/home/user PATH=/home/user/.local/bin:$PATH
# For a GPU set the variable TORCH_INDEX of the Space to https://pypi.org/simple: PyTorch with CUDA has gigabytes more.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN pip install --no-cache-dir torch torchvision --index-url $TORCH_INDEX
COPY --chown=user package package
RUN pip install --no-cache-dir "./package[app]"
COPY --chown=user . .
ENV GRADIO_SERVER_NAME=0.0.0.0 GRADIO_SERVER_PORT=7860
# PyTorch would take as many threads as the machine has processors, of which the Space has some.
CMD ["sh", "-c", "exec env OMP_NUM_THREADS=${CPU_CORES:-2} python app.py"]
