# make chat: from nothing to a chat with a model trained here.   make test: what CI runs.
PYTHON ?= python3
RUN = .venv/bin/python

chat: out/chat/best.pt
	$(RUN) chat.py

out/chat/best.pt: | data/instruction/meta.json
	$(RUN) train.py config/train_chat.py
.PRECIOUS: out/chat/best.pt  # Ctrl-C saves it; make would delete it

data/instruction/meta.json: data/instruction/instruction-data.json config/prepare_instruction.py | .venv/runtime
	$(RUN) prepare_alpaca.py config/prepare_instruction.py

test: .venv/dev
	.venv/bin/ruff check .
	$(RUN) -m pytest

.venv/runtime: requirements.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv .venv
	$(RUN) -m pip install --quiet -r requirements.txt
	touch $@

.venv/dev: requirements-dev.txt .venv/runtime
	$(RUN) -m pip install --quiet -r requirements-dev.txt
	touch $@

.PHONY: chat test
