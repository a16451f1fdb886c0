package main

import (
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"cloister.dev/cloister/webhook/annotation"
	"cloister.dev/cloister/webhook/inject"
)

// container states, by a word
var (
	yes       = true
	ranUntil  = metav1.NewTime(time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC))
	runs      = corev1.ContainerState{Running: &corev1.ContainerStateRunning{}}
	itsTurn   = corev1.ContainerState{Waiting: &corev1.ContainerStateWaiting{Reason: "PodInitializing"}}
	pulls     = corev1.ContainerState{Waiting: &corev1.ContainerStateWaiting{Reason: "ImagePullBackOff"}}
	crashLoop = corev1.ContainerState{Waiting: &corev1.ContainerStateWaiting{Reason: "CrashLoopBackOff"}}
)

func ended(code int32, message string) corev1.ContainerState {
	return corev1.ContainerState{Terminated: &corev1.ContainerStateTerminated{ExitCode: code, Message: message, FinishedAt: ranUntil}}
}

func containerStatus(name string, state corev1.ContainerState) corev1.ContainerStatus {
	return corev1.ContainerStatus{Name: name, State: state}
}

// confidentialPod has an injected console "app" in the states given.
func confidentialPod(name string, initboot, console corev1.ContainerStatus) *corev1.Pod {
	initboot.Name, console.Name = inject.Initboot, "app"
	return &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{
			Namespace: "shop", Name: name, CreationTimestamp: ranUntil,
			Annotations: map[string]string{annotation.Enclave: "app", annotation.Measurements: `{"PCR16":"` + strings.Repeat("ab", 48) + `"}`},
		},
		Spec: corev1.PodSpec{
			InitContainers: []corev1.Container{{Name: inject.Initboot}, {Name: inject.Sidecar}},
			Containers:     []corev1.Container{{Name: "app"}},
		},
		Status: corev1.PodStatus{
			Phase:                 corev1.PodRunning,
			InitContainerStatuses: []corev1.ContainerStatus{initboot},
			ContainerStatuses:     []corev1.ContainerStatus{console},
		},
	}
}

func TestDescribePod(t *testing.T) {
	booted := corev1.ContainerStatus{State: runs, Started: &yes}
	tests := map[string]struct {
		initboot, console corev1.ContainerStatus
		change            func(*corev1.Pod)
		want              podStatus // without what all have
	}{
		"no node":     {want: podStatus{Enclave: "waiting"}},
		"pulls image": {corev1.ContainerStatus{State: pulls}, corev1.ContainerStatus{State: itsTurn}, nil, podStatus{Enclave: "waiting (ImagePullBackOff)"}},
		"booting":     {corev1.ContainerStatus{State: runs}, corev1.ContainerStatus{State: itsTurn}, nil, podStatus{Enclave: "booting"}},
		"booted":      {booted, corev1.ContainerStatus{State: itsTurn}, nil, podStatus{Enclave: "booted", Booted: true}},
		"running":     {booted, corev1.ContainerStatus{State: runs}, nil, podStatus{Enclave: "running", Booted: true, Console: true}},
		"ready": {booted, corev1.ContainerStatus{State: runs}, func(p *corev1.Pod) {
			p.Status.Conditions = []corev1.PodCondition{{Type: corev1.PodScheduled, Status: corev1.ConditionTrue}, {Type: corev1.PodReady, Status: corev1.ConditionTrue}}
		}, podStatus{Enclave: "running", Booted: true, Console: true, Ready: true}},
		"console pulls": {booted, corev1.ContainerStatus{State: pulls}, nil, podStatus{Enclave: "waiting (ImagePullBackOff)", Booted: true}},
		"enclave lost": {
			booted, corev1.ContainerStatus{State: crashLoop, RestartCount: 2, LastTerminationState: ended(125, "the enclave\nwas lost\x1b[31m\n")},
			func(p *corev1.Pod) { p.Status.InitContainerStatuses[0].RestartCount = 1 },
			podStatus{Enclave: "waiting (CrashLoopBackOff)", Booted: true, Restarts: 3, Message: "the enclave was lost [31m"},
		},
		"runs again": {
			booted, corev1.ContainerStatus{State: runs, RestartCount: 1, LastTerminationState: ended(125, "the enclave was lost")}, nil,
			podStatus{Enclave: "running", Booted: true, Console: true, Restarts: 1, Message: "the enclave was lost"},
		},
		"ended": {
			corev1.ContainerStatus{State: ended(0, "")}, corev1.ContainerStatus{State: ended(3, "killed")}, nil,
			podStatus{Enclave: "ended (exit 3)", Message: "killed"},
		},
		"initboot ended": {
			corev1.ContainerStatus{State: ended(2, "the EIF is damaged")}, corev1.ContainerStatus{State: itsTurn}, nil,
			podStatus{Enclave: "ended (initboot: exit 2)", Message: "the EIF is damaged"},
		},
		"another container's message": {
			booted, corev1.ContainerStatus{State: runs},
			func(p *corev1.Pod) {
				p.Status.ContainerStatuses = append(p.Status.ContainerStatuses, containerStatus("other", ended(1, "not of interest")))
			},
			podStatus{Enclave: "running", Booted: true, Console: true},
		},
		"being deleted": {booted, corev1.ContainerStatus{State: runs}, func(p *corev1.Pod) { p.DeletionTimestamp = &ranUntil },
			podStatus{Phase: "Terminating", Enclave: "running", Booted: true, Console: true}},
		"not injected": {change: func(p *corev1.Pod) { p.Spec.InitContainers = nil }, want: podStatus{Enclave: "NOT INJECTED"}},
		"no measurement": {booted, corev1.ContainerStatus{State: runs}, func(p *corev1.Pod) { delete(p.Annotations, annotation.Measurements) },
			podStatus{Enclave: "running", Booted: true, Console: true, ClaimedPCR16: "-"}},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			pod := confidentialPod("web-1", test.initboot, test.console)
			if test.change != nil {
				test.change(pod)
			}
			want := test.want
			want.Namespace, want.Pod, want.Created = "shop", "web-1", ranUntil.Time
			if want.Phase == "" {
				want.Phase = "Running"
			}
			switch want.ClaimedPCR16 {
			case "":
				want.ClaimedPCR16 = strings.Repeat("ab", 48)
			case "-":
				want.ClaimedPCR16 = ""
			}
			if diff := cmp.Diff(want, describePod(pod)); diff != "" {
				t.Errorf("-want +got:\n%s", diff)
			}
		})
	}
}

// apiServer serves lists of pods, one pod a page, and names itself in KUBECONFIG.
func apiServer(t *testing.T, pods ...*corev1.Pod) {
	t.Helper()
	mux := http.NewServeMux()
	serve := func(w http.ResponseWriter, r *http.Request) {
		var found []*corev1.Pod
		for _, p := range pods {
			if ns := r.PathValue("namespace"); ns == "" || ns == p.Namespace {
				found = append(found, p)
			}
		}
		page := 0
		fmt.Sscan(r.URL.Query().Get("continue"), &page)
		list := corev1.PodList{TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "PodList"}}
		if page < len(found) {
			list.Items = []corev1.Pod{*found[page]}
			if page+1 < len(found) {
				list.Continue = fmt.Sprint(page + 1)
			}
		}
		w.Header().Set("Content-Type", "application/json")
		json.NewEncoder(w).Encode(list)
	}
	mux.HandleFunc("GET /api/v1/pods", serve)
	mux.HandleFunc("GET /api/v1/namespaces/{namespace}/pods", serve)
	mux.HandleFunc("GET /api/v1/namespaces/forbidden/pods", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(http.StatusForbidden)
		json.NewEncoder(w).Encode(metav1.Status{
			TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "Status"}, Status: metav1.StatusFailure,
			Message: "pods is forbidden", Reason: metav1.StatusReasonForbidden, Code: http.StatusForbidden,
		})
	})
	server := httptest.NewServer(mux)
	t.Cleanup(server.Close)
	t.Setenv("KUBECONFIG", writeFile(t, "kubeconfig", fmt.Appendf(nil, `apiVersion: v1
kind: Config
current-context: here
contexts: [{name: here, context: {cluster: here, namespace: shop}}]
clusters: [{name: here, cluster: {server: %q}}]
`, server.URL)))
}

func TestStatus(t *testing.T) {
	web := confidentialPod("web-1", corev1.ContainerStatus{State: runs, Started: &yes}, corev1.ContainerStatus{State: runs})
	web.Status.Conditions = []corev1.PodCondition{{Type: corev1.PodReady, Status: corev1.ConditionTrue}}
	web.CreationTimestamp = metav1.NewTime(time.Now().Add(-90 * time.Minute))
	lost := confidentialPod("api-1", corev1.ContainerStatus{State: runs, Started: &yes},
		corev1.ContainerStatus{State: crashLoop, RestartCount: 4, LastTerminationState: ended(125, "the enclave was lost")})
	lost.CreationTimestamp = web.CreationTimestamp
	open := confidentialPod("open", corev1.ContainerStatus{}, corev1.ContainerStatus{})
	open.Namespace, open.Spec.InitContainers, open.CreationTimestamp = "lab", nil, web.CreationTimestamp
	delete(open.Annotations, annotation.Measurements)
	ordinary := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "ordinary"}}
	apiServer(t, ordinary, web, lost, open)

	tests := map[string]struct {
		args   []string
		stdout string
	}{
		"namespace of the context": {nil, `
NAMESPACE  POD    PHASE    READY  RESTARTS  PCR16         ENCLAVE                     AGE  LAST MESSAGE
shop       api-1  Running  no     4         abababababab  waiting (CrashLoopBackOff)  90m  the enclave was lost
shop       web-1  Running  yes    0         abababababab  running                     90m  -
`},
		"one namespace": {[]string{"-n", "lab"}, `
NAMESPACE  POD   PHASE    READY  RESTARTS  PCR16  ENCLAVE       AGE  LAST MESSAGE
lab        open  Running  no     0         -      NOT INJECTED  90m  -
`},
		"all": {[]string{"-A"}, `
NAMESPACE  POD    PHASE    READY  RESTARTS  PCR16         ENCLAVE                     AGE  LAST MESSAGE
lab        open   Running  no     0         -             NOT INJECTED                90m  -
shop       api-1  Running  no     4         abababababab  waiting (CrashLoopBackOff)  90m  the enclave was lost
shop       web-1  Running  yes    0         abababababab  running                     90m  -
`},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			r := call(t, "", append([]string{"status"}, test.args...)...)
			r.want(t, 0, forPeople)
			if diff := cmp.Diff(strings.TrimPrefix(test.stdout, "\n"), r.stdout); diff != "" {
				t.Errorf("-want +got:\n%s", diff)
			}
		})
	}

	t.Run("json", func(t *testing.T) {
		r := call(t, "", "status", "-o", "json")
		r.want(t, 0)
		var got struct{ Pods []podStatus }
		if err := json.Unmarshal([]byte(r.stdout), &got); err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff([]podStatus{describePod(lost), describePod(web)}, got.Pods, cmp.Transformer("second", func(t time.Time) int64 { return t.Unix() })); diff != "" {
			t.Errorf("-want +got:\n%s", diff)
		}
	})
	t.Run("none", func(t *testing.T) {
		r := call(t, "", "status", "-n", "empty")
		r.want(t, 0, "no confidential pod in namespace empty", annotation.Enclave)
		if r.stdout != "" {
			t.Errorf("stdout is %q", r.stdout)
		}
		if r := call(t, "", "status", "-n", "empty", "-o", "json"); r.stdout != "{\n  \"pods\": []\n}\n" {
			t.Errorf("stdout is %q", r.stdout)
		}
	})
	t.Run("errors", func(t *testing.T) {
		call(t, "", "status", "-n", "forbidden").want(t, 1, "list pods: pods is forbidden")
		call(t, "", "status", "-A", "-n", "shop").want(t, 2, "leave one out")
		call(t, "", "status", "-o", "yaml").want(t, 2, "only json")
		t.Setenv("KUBECONFIG", writeFile(t, "kubeconfig", nil))
		t.Setenv("KUBERNETES_SERVICE_HOST", "")
		call(t, "", "status").want(t, 1, "find the cluster", "KUBECONFIG")
	})
}
