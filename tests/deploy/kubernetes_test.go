package deploy_test

import (
	"bufio"
	"bytes"
	"errors"
	"io"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	appsv1 "k8s.io/api/apps/v1"
	autoscalingv2 "k8s.io/api/autoscaling/v2"
	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	policyv1 "k8s.io/api/policy/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	utilyaml "k8s.io/apimachinery/pkg/util/yaml"
	"sigs.k8s.io/kustomize/api/krusty"
	"sigs.k8s.io/kustomize/kyaml/filesys"
	"sigs.k8s.io/yaml"
)

// The kinds of object that the manifests may hold, by Kubernetes' own types.
var kinds = map[string]func() any{
	"ConfigMap":               func() any { return &corev1.ConfigMap{} },
	"Deployment":              func() any { return &appsv1.Deployment{} },
	"HorizontalPodAutoscaler": func() any { return &autoscalingv2.HorizontalPodAutoscaler{} },
	"NetworkPolicy":           func() any { return &networkingv1.NetworkPolicy{} },
	"PersistentVolumeClaim":   func() any { return &corev1.PersistentVolumeClaim{} },
	"PodDisruptionBudget":     func() any { return &policyv1.PodDisruptionBudget{} },
	"Service":                 func() any { return &corev1.Service{} },
	"ServiceAccount":          func() any { return &corev1.ServiceAccount{} },
}

// build renders a kustomization as kubectl does and decodes every object with
// no field unknown.
func build(t *testing.T, dir string) map[string]any {
	t.Helper()
	result, err := krusty.MakeKustomizer(krusty.MakeDefaultOptions()).Run(filesys.MakeFsOnDisk(), filepath.Join("..", "..", "deploy", "kubernetes", dir))
	if err != nil {
		t.Fatal(err)
	}
	rendered, err := result.AsYaml()
	if err != nil {
		t.Fatal(err)
	}
	objects := map[string]any{}
	for r := utilyaml.NewYAMLReader(bufio.NewReader(bytes.NewReader(rendered))); ; {
		doc, err := r.Read()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		var head metav1.TypeMeta
		if err := yaml.Unmarshal(doc, &head); err != nil {
			t.Fatal(err)
		}
		made, ok := kinds[head.Kind]
		if !ok {
			t.Fatalf("%s: no kind %q is known here", dir, head.Kind)
		}
		object := made()
		if err := yaml.UnmarshalStrict(doc, object); err != nil {
			t.Errorf("%s: %s: %v\n%s", dir, head.Kind, err, doc)
		}
		objects[head.Kind] = object
	}
	return objects
}

func TestManifestsAreWhatKubernetesKnows(t *testing.T) {
	for _, dir := range []string{"base", "overlays/local-sandboxes", "overlays/temporal-cloud"} {
		t.Run(dir, func(t *testing.T) {
			objects := build(t, dir)
			worker := objects["Deployment"].(*appsv1.Deployment)
			pod := worker.Spec.Template
			// What selects the worker must find it.
			for name, selector := range map[string]map[string]string{
				"Deployment":          worker.Spec.Selector.MatchLabels,
				"Service":             objects["Service"].(*corev1.Service).Spec.Selector,
				"PodDisruptionBudget": objects["PodDisruptionBudget"].(*policyv1.PodDisruptionBudget).Spec.Selector.MatchLabels,
				"NetworkPolicy":       objects["NetworkPolicy"].(*networkingv1.NetworkPolicy).Spec.PodSelector.MatchLabels,
			} {
				if len(selector) == 0 {
					t.Errorf("the %s selects everything", name)
				}
				for k, v := range selector {
					if pod.Labels[k] != v {
						t.Errorf("the %s selects pods with %s=%s; the worker's has %q", name, k, v, pod.Labels[k])
					}
				}
			}
			container := pod.Spec.Containers[0]
			ports := map[string]bool{}
			for _, p := range container.Ports {
				ports[p.Name] = true
			}
			for _, p := range objects["Service"].(*corev1.Service).Spec.Ports {
				if !ports[p.TargetPort.StrVal] {
					t.Errorf("the Service leads to the port %q, which the worker does not have", p.TargetPort.StrVal)
				}
			}
			for _, rule := range objects["NetworkPolicy"].(*networkingv1.NetworkPolicy).Spec.Ingress {
				for _, p := range rule.Ports {
					if !ports[p.Port.StrVal] {
						t.Errorf("the NetworkPolicy lets in the port %q, which the worker does not have", p.Port.StrVal)
					}
				}
			}
			for name, probe := range map[string]*corev1.Probe{"readiness": container.ReadinessProbe, "liveness": container.LivenessProbe} {
				if probe == nil || probe.HTTPGet == nil || !ports[probe.HTTPGet.Port.StrVal] {
					t.Errorf("the %s probe asks no port of the worker", name)
				}
			}
			if s := pod.Spec.SecurityContext; s == nil || s.RunAsNonRoot == nil || !*s.RunAsNonRoot {
				t.Error("the worker may run as root")
			}
			if s := container.SecurityContext; s == nil || s.AllowPrivilegeEscalation == nil || *s.AllowPrivilegeEscalation ||
				s.Capabilities == nil || !slices.Contains(s.Capabilities.Drop, "ALL") {
				t.Error("the worker's container may gain privileges")
			}
			for _, m := range container.VolumeMounts {
				if !slices.ContainsFunc(pod.Spec.Volumes, func(v corev1.Volume) bool { return v.Name == m.Name }) {
					t.Errorf("no volume %q", m.Name)
				}
			}
			// Its settings come under the name that kustomize gave the map.
			from := container.EnvFrom[0].ConfigMapRef.Name
			if from != objects["ConfigMap"].(*corev1.ConfigMap).Name || !strings.HasPrefix(from, "sandbox-temporal-") {
				t.Errorf("the worker reads %q, and the map is called %q", from, objects["ConfigMap"].(*corev1.ConfigMap).Name)
			}
			if hpa, ok := objects["HorizontalPodAutoscaler"].(*autoscalingv2.HorizontalPodAutoscaler); ok && hpa.Spec.ScaleTargetRef.Name != worker.Name {
				t.Errorf("the autoscaler scales %q", hpa.Spec.ScaleTargetRef.Name)
			}
		})
	}
}

func TestOverlaysChangeWhatTheySay(t *testing.T) {
	local := build(t, "overlays/local-sandboxes")["Deployment"].(*appsv1.Deployment)
	pod := local.Spec.Template.Spec
	if pm := pod.Containers[0].SecurityContext.ProcMount; pm == nil || *pm != corev1.UnmaskedProcMount {
		t.Error("local sandboxes cannot mount their /proc")
	}
	if pod.SecurityContext.SeccompProfile.Type != corev1.SeccompProfileTypeUnconfined || pod.HostUsers == nil || *pod.HostUsers {
		t.Errorf("local sandboxes cannot be made: %+v", pod.SecurityContext)
	}
	if _, ok := build(t, "overlays/local-sandboxes")["HorizontalPodAutoscaler"]; ok {
		t.Error("one volume, and still an autoscaler")
	}
	cloud := build(t, "overlays/temporal-cloud")
	env := cloud["ConfigMap"].(*corev1.ConfigMap).Data
	mounted := cloud["Deployment"].(*appsv1.Deployment).Spec.Template.Spec.Containers[0].VolumeMounts
	for _, name := range []string{"TEMPORAL_TLS_CERT", "TEMPORAL_TLS_KEY"} {
		if !slices.ContainsFunc(mounted, func(m corev1.VolumeMount) bool { return filepath.Dir(env[name]) == m.MountPath }) {
			t.Errorf("%s=%s is mounted nowhere", name, env[name])
		}
	}
	if env["METRICS_PORT"] != "9090" {
		t.Error("the overlay lost the settings below it")
	}
}
