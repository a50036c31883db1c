# make chat: train a model and chat with it.   make test: what CI runs.
# make bench: measure speed (takes an hour).   make clean: remove what make chat made.
PYTHON ?= python3
RUN = .venv/bin/python
WRITTEN = data/instruction/instruction-data.json
RULES = data/rules.py data/operands.py data/words.txt data/wordings.txt $(WRITTEN)

chat: out/chat/done
	$(RUN) chat.py

# Synthetic rows, and a model that learns their rules. A run that was stopped resumes.
data/rules/rules.json: $(RULES) | .venv/runtime
	$(RUN) -m data.rules

data/rules/meta.json: data/rules/rules.json config/prepare_rules.py
	$(RUN) prepare_alpaca.py config/prepare_rules.py

out/rules/done: data/rules/meta.json
	$(RUN) train.py config/train_rules.py --resume=True
	touch $@

# Then it memorizes the hand-written rows.
data/rules/some.json: $(RULES) | .venv/runtime
	$(RUN) -m data.rules --rows=26000 --out=$@

data/chat/meta.json: data/rules/some.json data/rules/meta.json config/prepare_chat.py
	$(RUN) prepare_alpaca.py config/prepare_chat.py

out/chat/done: out/rules/done data/chat/meta.json
	$(RUN) finetune.py config/finetune_chat.py --resume=True
	touch $@

test: .venv/dev
	.venv/bin/ruff check .
	$(RUN) -m pytest

# To run only some parts: .venv/bin/python -m tests.bench --help
bench: .venv/dev out/chat/done data/shakespeare/input.txt
	$(RUN) -m tests.bench

data/shakespeare/input.txt: | .venv/runtime
	$(RUN) -m data.text config/prepare_shakespeare.py

# Delete by name, since the folders may contain files of yours. Downloads stay: .venv, data/shakespeare.
MADE = rules.json some.json train.bin val.bin meta.json tokenizer.json chat_corpus.txt \
       best.pt last.pt log.csv loss.png done
FOLDERS = out/chat out/rules data/chat data/rules

clean:
	rm -f $(foreach folder,$(FOLDERS),$(addprefix $(folder)/,$(MADE)))
	rmdir $(FOLDERS) out 2> /dev/null || true
	rm -rf .ruff_cache .hypothesis
	find . -path ./.venv -prune -o -name __pycache__ -exec rm -rf {} +

.venv/runtime: requirements.txt
	$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 15) and "Python 3.10 to 3.14 is needed: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv .venv
	$(RUN) -m pip install --quiet -r requirements.txt
	touch $@

.venv/dev: requirements-dev.txt .venv/runtime
	$(RUN) -m pip install --quiet -r requirements-dev.txt
	touch $@

.PHONY: chat test bench clean
