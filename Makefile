# ROS_DISTRO=kilted make ... for the other distribution. Where ROS is sourced, that one is used.
ENVIRONMENT := python3 tools/environment.py
# On all cores, for what needs no ROS.
PARALLEL := -n auto --maxprocesses 8 --dist loadfile
# Nodes mostly wait: two files at a time. Each test has a DDS domain that no other test uses meanwhile.
PARALLEL_ROS := -n 2 --dist loadfile
SHELL := bash
.SHELLFLAGS := -o pipefail -c

.PHONY: help setup demo bench check test test-second test-both lint chaos soak clean

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST)

setup:  ## virtual environment, ROS 2 if it is not sourced, colcon build
	@$(ENVIRONMENT) setup

demo:  ## replay a synthetic flight through the node; results in demo_output/
	@$(ENVIRONMENT) run c7_demo --output demo_output

bench:  ## this node beside the bare engine and a forty-line node, 4 minutes; results in bench_output/
	@$(ENVIRONMENT) run c7_bench --quick --output bench_output

lint:  ## ruff, mypy and the list of words to avoid
	$(ENVIRONMENT) run ruff check .
	$(ENVIRONMENT) run mypy
	$(ENVIRONMENT) run python3 tools/plain_words.py

check: lint  ## ruff, mypy and the unit tests, in two minutes
	$(ENVIRONMENT) run python3 -m pytest $(PARALLEL) test/unit

test: lint  ## ruff, mypy and every test this machine can run (TESTS="..." for some); skips are listed with their reasons
ifdef TESTS
	$(ENVIRONMENT) run python3 -m pytest $(TESTS)
else
	$(ENVIRONMENT) run python3 -m pytest $(PARALLEL) test/unit test/process test/fuzz test/packaging
	$(ENVIRONMENT) run python3 -m pytest $(PARALLEL_ROS) test/ros
	$(ENVIRONMENT) run python3 -m pytest test/launch test/gpu
endif

test-second: lint  ## of make test, what may differ on a second ROS distribution
	$(ENVIRONMENT) run python3 -m pytest $(PARALLEL) -m 'not once' test/process test/packaging
	$(ENVIRONMENT) run python3 -m pytest $(PARALLEL_ROS) -m 'not once' test/ros
	$(ENVIRONMENT) run python3 -m pytest -m 'not once' test/launch

test-both:  ## make test on ROS 2 Jazzy and, side by side, make test-second on Kilted (JOBS=1: after it, as in CI)
	@results=$$(mktemp); \
	$(MAKE) --no-print-directory --jobs=$(JOBS) --keep-going RESULTS=$$results jazzy-test kilted-test-second; \
	code=$$?; cat $$results; rm $$results; exit $$code

# Each line of the output names the distribution; the last lines say what passed, and name each test that failed.
RESULTS := /dev/stdout
JOBS := 2
jazzy-%: export ROS_DISTRO := jazzy
kilted-%: export ROS_DISTRO := kilted
jazzy-% kilted-%:
	@result=passed; $(MAKE) --no-print-directory $* 2>&1 | sed -u 's/^/$(ROS_DISTRO) | /' \
		| tee >(grep --line-buffered -E '^$(ROS_DISTRO) \| (FAILED|ERROR) ' >> $(RESULTS)) || result=FAILED; \
	echo "$(ROS_DISTRO): make $* $$result after $$SECONDS s" >> $(RESULTS); [ $$result = passed ]

chaos:  ## kill, crash and stop the node's workers for minutes and account for every frame
	$(ENVIRONMENT) run python3 test/measure/chaos.py

soak:  ## new random examples: properties, networks, damaged bags, nodes that are killed, ended or fed hostile images
	$(ENVIRONMENT) run python3 -m pytest -m hypothesis --hypothesis-profile=random
	C7_SOAK_NETWORKS=$${C7_SOAK_NETWORKS:-200} C7_SOAK_FRAMES=$${C7_SOAK_FRAMES:-100} \
		$(ENVIRONMENT) run python3 -m pytest test/fuzz/test_differential.py -s
	C7_END_RUNS=$${C7_END_RUNS:-60} $(ENVIRONMENT) run python3 -m pytest test/ros/test_node_end.py
	$(ENVIRONMENT) run python3 test/measure/answers.py
	C7_SOAK_BAGS=$${C7_SOAK_BAGS:-5000} $(ENVIRONMENT) run python3 -m pytest test/ros/test_bag.py -k 'unseen or flipped'
	$(ENVIRONMENT) run python3 test/measure/hostile.py

clean:  ## remove every environment, build and output
	rm -rf .venv .build build install log demo_output bench_output .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
