# gmemd in a container: the keeper is pid 1 and holds the memory, so the daemon under it may die.
# BASE has Python 3.11 or newer with its headers, venv and pip (22.3 or newer), and a shell.
ARG BASE=python:3.12-slim

FROM ${BASE} AS build
# 1: the hot path is compiled; empty: gmemd is pure Python, which needs neither the headers nor a C compiler.
ARG GMEMD_COMPILE=1
RUN [ -z "$GMEMD_COMPILE" ] || command -v cc >/dev/null \
 || { apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev; }
COPY pyproject.toml setup.py README.md /src/
COPY gmemd /src/gmemd
# What else the image is for: EXTRAS=kubernetes adds gmemd-dra.
ARG EXTRAS=
# A site's settings of pip come as build secrets; those that are not given are left out.
RUN --mount=type=secret,id=pip.conf,target=/etc/pip.conf \
    --mount=type=secret,id=ca-certificates.crt,target=/etc/ssl/certs/ca-certificates.crt \
    python3 -m venv --without-pip /opt/gmemd \
 && python3 -m pip --python /opt/gmemd/bin/python install --no-cache-dir --disable-pip-version-check "/src${EXTRAS:+[$EXTRAS]}"

FROM ${BASE}
# Clients need the group to open the socket (--group-add 10001); they cannot write to its directory.
RUN echo 'gmemd:x:10001:' >>/etc/group \
 && echo 'gmemd:x:10001:10001:Guest memory daemon:/:/usr/sbin/nologin' >>/etc/passwd \
 && install -d -m 0750 -o 10001 -g 10001 /run/gmemd
COPY --from=build /opt/gmemd /opt/gmemd
ENV PATH=/opt/gmemd/bin:$PATH GMEMD_SOCKET=/run/gmemd/qmp.sock
USER 10001:10001
VOLUME /run/gmemd
HEALTHCHECK --interval=30s --timeout=5s --start-period=5s \
    CMD ["gmemctl", "qmp", "{\"execute\": \"query-status\"}"]
# Arguments of `run` go to the daemon: --object SPEC, --kernel simulated, ...
ENTRYPOINT ["gmemd", "--keeper", "--watchdog", "10", "--qmp", "unix:/run/gmemd/qmp.sock"]
