// Command gateway-api is a plugin of Argo Rollouts that writes the weights of an HTTPRoute's backends.
//
// It stands in for the Gateway API plugin of Argo Rollouts, whose module cannot be had from the module proxy: it has the
// same configuration, and of what that one does the one thing that a canary by weight needs.
package main

import (
	"context"
	"encoding/json"
	"fmt"
	"log"

	"github.com/argoproj/argo-rollouts/pkg/apis/rollouts/v1alpha1"
	"github.com/argoproj/argo-rollouts/rollout/trafficrouting/plugin/rpc"
	"github.com/argoproj/argo-rollouts/utils/plugin/types"
	"github.com/hashicorp/go-plugin"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/util/retry"
)

func main() {
	plugin.Serve(&plugin.ServeConfig{
		// What a traffic router's controller says, so that nobody starts it by hand.
		HandshakeConfig: plugin.HandshakeConfig{
			ProtocolVersion:  1,
			MagicCookieKey:   "ARGO_ROLLOUTS_RPC_PLUGIN",
			MagicCookieValue: "trafficrouter",
		},
		Plugins: map[string]plugin.Plugin{
			"RpcTrafficRouterPlugin": &rpc.RpcTrafficRouterPlugin{Impl: &router{}},
		},
	})
}

// router changes routes of the cluster that it runs in.
type router struct {
	client dynamic.Interface
}

// route is what a Rollout says of its route, at trafficRouting.plugins.
type route struct {
	HTTPRoute string `json:"httpRoute"`
	Namespace string `json:"namespace"`
}

func (r *router) InitPlugin() types.RpcError {
	config, err := rest.InClusterConfig()
	if err == nil {
		r.client, err = dynamic.NewForConfig(config)
	}
	return told(err)
}

// SetWeight gives the canary its share of the requests, and the stable Service the rest.
func (r *router) SetWeight(rollout *v1alpha1.Rollout, weight int32, _ []v1alpha1.WeightDestination) types.RpcError {
	canary := rollout.Spec.Strategy.Canary
	var at route
	if err := json.Unmarshal(canary.TrafficRouting.Plugins[name], &at); err != nil {
		return told(fmt.Errorf("trafficRouting.plugins[%s]: %w", name, err))
	}
	weights := map[string]int64{canary.CanaryService: int64(weight), canary.StableService: int64(100 - weight)}
	routes := r.client.Resource(httpRoutes).Namespace(at.Namespace)
	err := retry.RetryOnConflict(retry.DefaultRetry, func() error {
		object, err := routes.Get(context.Background(), at.HTTPRoute, metav1.GetOptions{})
		if err != nil {
			return err
		}
		if !setWeights(object, weights) {
			return nil
		}
		log.Printf("%s/%s: the canary gets %d of 100", at.Namespace, at.HTTPRoute, weight)
		_, err = routes.Update(context.Background(), object, metav1.UpdateOptions{})
		return err
	})
	return told(err)
}

// setWeights writes the weight of each backend that has one, and says whether any was another before.
func setWeights(object *unstructured.Unstructured, weights map[string]int64) bool {
	changed := false
	rules, _, _ := unstructured.NestedSlice(object.Object, "spec", "rules")
	for _, rule := range rules {
		backends, _ := rule.(map[string]any)["backendRefs"].([]any)
		for _, entry := range backends {
			backend := entry.(map[string]any)
			if weight, ok := weights[fmt.Sprint(backend["name"])]; ok && backend["weight"] != weight {
				backend["weight"] = weight
				changed = true
			}
		}
	}
	if changed {
		_ = unstructured.SetNestedSlice(object.Object, rules, "spec", "rules")
	}
	return changed
}

func (r *router) UpdateHash(*v1alpha1.Rollout, string, string, []v1alpha1.WeightDestination) types.RpcError {
	return types.RpcError{}
}

func (r *router) SetHeaderRoute(*v1alpha1.Rollout, *v1alpha1.SetHeaderRoute) types.RpcError {
	return types.RpcError{ErrorString: "this plugin sets weights alone"}
}

func (r *router) SetMirrorRoute(*v1alpha1.Rollout, *v1alpha1.SetMirrorRoute) types.RpcError {
	return types.RpcError{ErrorString: "this plugin sets weights alone"}
}

func (r *router) VerifyWeight(*v1alpha1.Rollout, int32, []v1alpha1.WeightDestination) (types.RpcVerified, types.RpcError) {
	return types.NotImplemented, types.RpcError{}
}

func (r *router) RemoveManagedRoutes(*v1alpha1.Rollout) types.RpcError {
	return types.RpcError{}
}

func (r *router) Type() string {
	return name
}

func told(err error) types.RpcError {
	if err == nil {
		return types.RpcError{}
	}
	return types.RpcError{ErrorString: err.Error()}
}

const name = "argoproj-labs/gatewayAPI"

var httpRoutes = schema.GroupVersionResource{Group: "gateway.networking.k8s.io", Version: "v1", Resource: "httproutes"}
