# A Space of Hugging Face that shows app.py: the package is compiled here, for the processors of the Space.
FROM python:3.12
RUN useradd --create-home --uid 1000 user
USER user
WORKDIR /home/user/app
ENV PATH=/home/user/.local/bin:$PATH
COPY --chown=user package package
RUN pip install --no-cache-dir "./package[app]"
COPY --chown=user . .
ENV GRADIO_SERVER_NAME=0.0.0.0 GRADIO_SERVER_PORT=7860
CMD ["python", "app.py"]
