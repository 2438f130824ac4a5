# SPDX-License-Identifier: Apache-2.0
# Build, test and install Bulkhead. `make help` lists the targets.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
# Steps depend on each other in the order in which they are named; cargo and the kernel's make use all processors themselves.
.NOTPARALLEL:

CARGO ?= cargo
PREFIX ?= /usr/local
DESTDIR ?=

# The built tree has the layout of an installed one.
TREE := target/bulkhead
DEST := $(DESTDIR)$(PREFIX)
# Containerd's shim is the same program under its name.
SHIM := bin/containerd-shim-bulkhead-v2
PARTS := bin/bulkhead $(SHIM) lib/bulkhead/bulkhead-vmm lib/bulkhead/vmlinux lib/bulkhead/initramfs.cpio

COMPLETIONS := share/bash-completion/completions/bulkhead share/zsh/site-functions/_bulkhead \
    share/fish/vendor_completions.d/bulkhead.fish

# The programs of the host are static, and their relocations packed: nothing to look for, and little to touch, at each start.
HOST_TARGET := x86_64-unknown-linux-gnu
HOST_FLAGS := -C target-feature=+crt-static -C strip=symbols -C link-arg=-Wl,-z,pack-relative-relocs
HOST := target/$(HOST_TARGET)/release

# The agent is static. The musl target makes it smaller and is used where it is installed.
MUSL := x86_64-unknown-linux-musl
AGENT_TARGET := $(shell [ -d "$$(rustc --print target-libdir --target $(MUSL) 2>/dev/null)" ] && echo $(MUSL) || echo x86_64-unknown-linux-gnu)
AGENT_FLAGS := -C target-feature=+crt-static -C relocation-model=static -C force-unwind-tables=no
AGENT := target/$(AGENT_TARGET)/agent/bulkhead-agent

.PHONY: help
help: ## Print this
	@echo 'usage: make TARGET [PREFIX=/usr/local] [DESTDIR=] [KERNEL_SRC=TREE] [BULKHEAD_CACHE=FOLDER]'
	@echo
	@sed -nE 's/^([a-z0-9-]+):.*## (.*)/  \1\t\2/p' $(firstword $(MAKEFILE_LIST)) | expand -t 18
	@echo
	@echo 'tests/kvm-host/run COMMAND runs any command where KVM works, on any machine.'

.PHONY: setup setup-tests
setup: ## Install the Debian packages that are missing (apt; as root or through sudo)
	@.ci/setup

setup-tests: ## The same, with the container engines that the tests drive
	@.ci/setup --tests

.PHONY: build build-host build-agent build-kernel
build: build-host build-agent build-kernel ## Build everything into target/bulkhead/, without running it
	@install -d $(TREE)/bin $(TREE)/lib/bulkhead
	@install -C -m 755 $(HOST)/bulkhead $(TREE)/bin/bulkhead
	@ln -sf bulkhead $(TREE)/$(SHIM)
	@install -C -m 755 $(HOST)/bulkhead-vmm $(TREE)/lib/bulkhead/bulkhead-vmm
	@install -C -m 644 "$$(guest-kernel/build)" $(TREE)/lib/bulkhead/vmlinux
	@target/release/bulkhead-rootfs-builder initramfs --agent $(AGENT) --output $(TREE)/lib/bulkhead/initramfs.cpio.new
	@install -C -m 644 $(TREE)/lib/bulkhead/initramfs.cpio.new $(TREE)/lib/bulkhead/initramfs.cpio
	@rm $(TREE)/lib/bulkhead/initramfs.cpio.new
	@cd $(TREE) && for part in $(PARTS); do printf '%10d bytes  $(TREE)/%s\n' "$$(stat -L -c %s $$part)" $$part; done

build-host:
	RUSTFLAGS='$(HOST_FLAGS)' $(CARGO) build --release --target $(HOST_TARGET) -p bulkhead -p bulkhead-vmm
	$(CARGO) build --release -p bulkhead-rootfs-builder

build-agent:
	RUSTFLAGS='$(AGENT_FLAGS)' $(CARGO) build --profile agent --target $(AGENT_TARGET) -p bulkhead-agent

build-kernel:
	@guest-kernel/build >/dev/null

.PHONY: run
run: setup build ## Run a busybox container and show its kernel beside the host's
	@tests/demo/busybox $(TREE)

.PHONY: test test-unit test-e2e test-runc test-cgroup-v1 check
test: setup-tests build ## Everything: format, clippy, unit tests, then end-to-end tests where KVM works
	@E2E_STRICT=1 tests/all fmt clippy unit deb cgroup_v1+runc_some e2e

check: ## Format and clippy
	@tests/all fmt clippy

test-unit: ## Unit tests (neither KVM nor root)
	@tests/all unit

test-e2e: build ## End-to-end tests, where KVM works (E2E_ARGS="--filter NAME")
	@tests/all e2e

test-cgroup-v1: build ## Those for hosts with cgroups of version 1, in an emulated one
	@tests/all cgroup_v1

test-runc: setup-tests ## Check the end-to-end tests themselves: those that hold for any OCI runtime, with runc
	@tests/all runc

.PHONY: bench bench-icount bench-net bench-pods
bench: setup build ## Measure starts beside QEMU, runc and crun, and draw docs/start-phases.svg
	@tests/bench/run $(BENCH_ARGS)
	@tests/bench/phases

bench-icount: setup build ## The same on the instruction clock
	@tests/bench/run --icount $(BENCH_ARGS)
	@tests/bench/phases

bench-net: setup build ## Measure networks beside QEMU and runc (BENCH_ARGS="--rounds 5")
	@tests/bench/run --network $(BENCH_ARGS)

bench-pods: setup-tests build ## Measure pods under containerd beside runc's (BENCH_ARGS="--rounds 10")
	@tests/bench/run --pods $(BENCH_ARGS)

.PHONY: debug-image
debug-image: setup-tests build-agent ## Make target/debug.erofs: the guest image with a shell in it, to mount and look into
	$(CARGO) build --release -p bulkhead-rootfs-builder
	@target/release/bulkhead-rootfs-builder debug --agent $(AGENT) --shell /bin/busybox --output target/debug.erofs
	@echo target/debug.erofs

.PHONY: install uninstall
install: ## Install the built tree into DESTDIR/PREFIX
	@for part in $(PARTS); do [ -f $(TREE)/$$part ] || { echo "$(TREE)/$$part is not built, building first"; $(MAKE) build; break; }; done
	install -d $(DEST)/bin $(DEST)/lib/bulkhead $(DEST)/share/bulkhead $(DEST)/share/doc/bulkhead/docs
	install -m 755 $(TREE)/bin/bulkhead $(DEST)/bin/bulkhead
	ln -sf bulkhead $(DEST)/$(SHIM)
	install -m 755 $(TREE)/lib/bulkhead/bulkhead-vmm $(DEST)/lib/bulkhead/bulkhead-vmm
	install -m 644 $(TREE)/lib/bulkhead/vmlinux $(TREE)/lib/bulkhead/initramfs.cpio $(DEST)/lib/bulkhead/
	install -m 644 docs/runtimeclass.yaml $(DEST)/share/bulkhead/
	install -m 644 README.md LICENSE $(DEST)/share/doc/bulkhead/
	install -m 644 $(wildcard docs/*.md docs/*.svg docs/*.yaml) $(DEST)/share/doc/bulkhead/docs/
	$(TREE)/bin/bulkhead man $(DEST)/share/man/man8
	install -d $(dir $(addprefix $(DEST)/,$(COMPLETIONS)))
	$(TREE)/bin/bulkhead completion bash >$(DEST)/share/bash-completion/completions/bulkhead
	$(TREE)/bin/bulkhead completion zsh >$(DEST)/share/zsh/site-functions/_bulkhead
	$(TREE)/bin/bulkhead completion fish >$(DEST)/share/fish/vendor_completions.d/bulkhead.fish

uninstall: ## Remove what install put there
	rm -f $(addprefix $(DEST)/,$(PARTS) $(COMPLETIONS)) $(DEST)/share/man/man8/bulkhead.8 $(DEST)/share/man/man8/bulkhead-*.8
	rm -rf $(DEST)/share/doc/bulkhead $(DEST)/share/bulkhead
	-rmdir --ignore-fail-on-non-empty $(DEST)/lib/bulkhead

.PHONY: deb
deb: ## Make target/bulkhead_VERSION_amd64.deb of the built tree
	@.ci/deb

.PHONY: clean
clean: ## Remove target/ (the cache of kernels stays, see guest-kernel/README.md)
	rm -rf target
